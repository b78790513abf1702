"""Named ranges in a device profiler's timeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from deepspeed.accelerator import get_accelerator

_P = ParamSpec("_P")
_R = TypeVar("_R")


def instrument_w_nvtx(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: shows each call of `function` as a range of its name (nothing on a device without ranges)."""

    @functools.wraps(function)
    def instrumented(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        get_accelerator().range_push(function.__qualname__)
        try:
            return function(*args, **kwargs)
        finally:
            get_accelerator().range_pop()

    return instrumented
