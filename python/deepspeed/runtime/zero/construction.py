"""`deepspeed.zero.Init`: a model is built into memory that all ranks share, or, where they share none, each rank keeps a
part of every parameter; so no rank ever holds all of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

import torch

from deepspeed import _native
from deepspeed._features import not_built
from deepspeed.comm import init_distributed
from deepspeed.runtime import process_group
from deepspeed.runtime.zero.gathered_weights import SlicedHome
from deepspeed.runtime.zero.gathering import GatheredParameters
from deepspeed.runtime.zero.sharded_parameter import is_sharded, mark_sharded
from deepspeed.runtime.zero.shared_weights import DraftHome, alias

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Init(contextlib.AbstractContextManager["Init"]):
    """Builds modules sharded: as soon as a module is made, its parameters move to memory that all ranks of the host
    share, with rank 0's values.

    module                 a module whose parameters are moved at once; then no context is needed.
    config_dict_or_path    the config of the run, for the dtype of the weights (`config` is an older name).
    dtype                  the dtype of the weights; by default the config's, else they keep theirs.
    remote_device          where weights lie while they are not used: "cpu" and "none" are the host's memory, "nvme" a file in
                           the config's zero_optimization.offload_param.nvme_path; by default what the config says.
    enabled                False builds modules as usual.

    In the context `Module.apply` lets rank 0 write, as `GatheredParameters(..., modifier_rank=0)` does. Elsewhere what
    another rank than 0 writes to a parameter is forgotten when the context ends; where ranks share no memory, writing
    elsewhere is an error.
    """

    _open: ClassVar[list[Init]] = []

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ):
        self.enabled = enabled
        if not enabled:
            return
        if data_parallel_group is not None or zero_param_parallel_group is not None or sequence_data_parallel_group:
            not_built("deepspeed.zero.Init with a process group", "sharding over a part of the ranks")
        if zero_quantized_weights or zero_quantized_nontrainable_weights:
            not_built("deepspeed.zero.Init with quantized weights", "ZeRO++ (quantized communication)")
        if mpu is not None and mpu.get_model_parallel_world_size() != 1:
            not_built("deepspeed.zero.Init(mpu=...) with a model-parallel world above 1", "model parallelism")
        if remote_device not in (None, "none", "cpu", "nvme"):
            raise ValueError(f"remote_device={remote_device!r}: None, 'none', 'cpu' and 'nvme' are possible")
        init_distributed()
        judged = _judged(config_dict_or_path if config_dict_or_path is not None else config)
        self._dtype_for = _dtype_rule(dtype, judged)
        self._group = process_group.construction_group()
        self._folder = None if judged is None or remote_device in ("cpu", "none") else judged.weights_folder()
        if remote_device == "nvme" and self._folder is None:
            raise ValueError(
                "zero.Init(remote_device='nvme') needs a folder: pass a config_dict_or_path with "
                "zero_optimization.offload_param of device 'nvme' and its nvme_path"
            )
        self._sliced = SlicedHome(self._group, self._folder)
        self._drafts: list[torch.nn.Parameter] = []
        self._patches = contextlib.ExitStack()
        if module is not None:
            for owner in module.modules():
                self._move(owner)

    def __enter__(self) -> Init:
        if self.enabled:
            if not Init._open:
                _patch_construction(self._patches)
            Init._open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        Init._open.remove(self)
        self._patches.close()
        if error is None and self._drafts and not self._group.shares_memory():
            for parameter in self._drafts:
                self._sliced.check(parameter)
        elif error is None and self._drafts:
            # Rank 0's last words count, also for what was written outside any GatheredParameters.
            with GatheredParameters(self._drafts, modifier_rank=0):
                pass
        self._drafts.clear()

    def _move(self, module: torch.nn.Module) -> None:
        """Moves the parameters that `module` itself has."""
        found = [
            (f"{type(module).__name__}.{name}", p)
            for name, p in module._parameters.items()
            if p is not None and not is_sharded(p) and p.dtype in _DTYPES and p.numel() > 0 and not p.is_meta
        ]
        if not found:
            return
        if not self._group.shares_memory():
            for name, parameter in found:
                self._sliced.adopt(parameter, name, self._dtype_for(parameter.dtype))
                self._drafts.append(parameter)
            return
        tensors = [(name, p.data.cpu(), self._dtype_for(p.dtype)) for name, p in found]
        weights, addresses = _native.share_draft(self._group, tensors, self._folder)
        home = DraftHome(self._group, weights)
        for (_, parameter), (_, _, dtype), address in zip(found, tensors, addresses, strict=True):
            alias(parameter, address, dtype, weights)
            mark_sharded(parameter, home)
            self._drafts.append(parameter)


def shutdown_init_context() -> None:
    """Ends every open `Init`; `deepspeed.initialize` calls it, for models that open one and never leave it."""
    while Init._open:
        Init._open[-1].__exit__(None, None, None)


def _judged(config: Any) -> _native.Config | None:
    if config is None:
        return None
    from deepspeed.runtime.config import judge

    # Libraries build the model before they have filled in what depends on it.
    return judge(config, template=True)


def _dtype_rule(dtype: torch.dtype | None, config: _native.Config | None) -> Callable[[torch.dtype], torch.dtype]:
    if dtype is not None:
        return lambda _own: dtype
    return (lambda own: own) if config is None else config.compute_dtype


def _patch_construction(stack: contextlib.ExitStack) -> None:
    """Until `stack` closes, every module is moved by the innermost `Init` when its constructor returns."""
    building: set[int] = set()

    def wrap(cls: type) -> None:
        original = cls.__dict__.get("__init__")
        if original is None:
            return

        @functools.wraps(original)
        def construct(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            if id(self) in building:  # the constructor of a base class
                original(self, *args, **kwargs)
                return
            building.add(id(self))
            try:
                original(self, *args, **kwargs)
            finally:
                building.discard(id(self))
            if Init._open:
                Init._open[-1]._move(self)

        cls.__init__ = construct  # type: ignore[misc]
        stack.callback(setattr, cls, "__init__", original)

    for cls in _subclasses(torch.nn.Module):
        wrap(cls)

    inherited = torch.nn.Module.__init_subclass__

    def define(cls: type, **kwargs: Any) -> None:
        inherited(**kwargs)
        wrap(cls)

    torch.nn.Module.__init_subclass__ = classmethod(define)  # type: ignore[assignment,arg-type]
    stack.callback(delattr, torch.nn.Module, "__init_subclass__")

    apply = torch.nn.Module.apply

    def gathered_apply(self: torch.nn.Module, function: Callable[[torch.nn.Module], None]) -> torch.nn.Module:
        def on_rank_0(module: torch.nn.Module) -> None:
            with GatheredParameters(list(module.parameters(recurse=False)), modifier_rank=0):
                function(module)

        return apply(self, on_rank_0)

    torch.nn.Module.apply = gathered_apply  # type: ignore[method-assign,assignment]
    stack.callback(setattr, torch.nn.Module, "apply", apply)


def _subclasses(cls: type) -> list[type]:
    found: list[type] = []
    sub: type
    for sub in cls.__subclasses__():
        found += [sub, *_subclasses(sub)]
    return list(dict.fromkeys(found))
