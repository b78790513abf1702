"""The communication logger: which collectives ran how often, on how many bytes, and how long they took."""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from deepspeed import _native

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The arguments that hold what one rank gives, by the names that the operations use.
_GIVEN = ("tensor", "tensors", "input_list", "input_tensors", "input_tensor_list")


class CommsLogger:
    """What is recorded, and how it is shown.

    enabled    whether anything is recorded.
    prof_all   all operations; else those in `prof_ops`, by name ("all_reduce", and "engine all_gather" for the
               engine's own).
    verbose    prints each operation at once; `debug` names its caller in that line.
    """

    def __init__(self) -> None:
        self.enabled = self.verbose = self.debug = False
        self.prof_all = True
        self.prof_ops: list[str] = []
        self.log: _native.CommsLog | None = None

    def configure(self, **settings: Any) -> None:
        """Changes the settings that are given (not None)."""
        given = {name: value for name, value in settings.items() if value is not None}
        for name, value in given.items():
            setattr(self, name, value)
        if self.enabled and (self.log is None or {"prof_all", "prof_ops"} & given.keys()):
            world = dist.get_world_size() if dist.is_initialized() else 1
            self.log = _native.CommsLog(world, None if self.prof_all else list(self.prof_ops))

    def active_log(self) -> _native.CommsLog | None:
        """Where to record, if at all."""
        return self.log if self.enabled else None


comms_logger = CommsLogger()


def recorded(operation: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator of an operation: its calls are recorded while the logger is enabled. Of one that does not wait only the
    start is timed."""
    signature = inspect.signature(operation)

    @functools.wraps(operation)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        log = comms_logger.active_log()
        if log is None:
            return operation(*args, **kwargs)
        began = time.perf_counter()
        found = operation(*args, **kwargs)
        took = time.perf_counter() - began
        line = log.add(operation.__name__, _bytes_given(signature.bind(*args, **kwargs).arguments), took)
        if line is not None and comms_logger.verbose:
            caller = sys._getframe(1).f_code
            print(f"{line} | {caller.co_filename}: {caller.co_name}" if comms_logger.debug else line, flush=True)
        return found

    return call


def _bytes_given(arguments: dict[str, Any]) -> int:
    for name in _GIVEN:
        given = arguments.get(name)
        if isinstance(given, torch.Tensor):
            return given.nbytes
        if isinstance(given, Sequence):
            return sum(tensor.nbytes for tensor in given)
    return 0
