"""Stage-3 sharded parameters. Without stage 3 every parameter is whole, so gathering one changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from enum import Enum
from types import TracebackType
from typing import Any

import torch

from deepspeed._features import not_built, unbuilt_class, unbuilt_function

_STAGE3 = "ZeRO stage 3"


class ZeroParamType(Enum):
    """How a parameter is kept."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroParamStatus(Enum):
    """Whether a sharded parameter is whole at the moment."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Init(contextlib.AbstractContextManager["Init"]):
    """Context in which modules are built sharded (stage 3). `enabled=False` builds them as usual."""

    def __init__(self, module: torch.nn.Module | None = None, *args: Any, enabled: bool = True, **kwargs: Any):
        if enabled:
            not_built("deepspeed.zero.Init", _STAGE3)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class GatheredParameters(contextlib.AbstractContextManager[None]):
    """Context in which the given parameters are whole on every rank; whole parameters are left as they are."""

    def __init__(
        self,
        params: torch.nn.Parameter | Iterable[torch.nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ):
        listed = [params] if isinstance(params, torch.Tensor) else list(params)
        if enabled and any(hasattr(parameter, "ds_id") for parameter in listed):
            not_built("deepspeed.zero.GatheredParameters on a sharded parameter", _STAGE3)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


register_external_parameter = unbuilt_function("deepspeed.zero.register_external_parameter", _STAGE3)
unregister_external_parameter = unbuilt_function("deepspeed.zero.unregister_external_parameter", _STAGE3)
unwrap_model_for_generation = unbuilt_function("deepspeed.zero.unwrap_model_for_generation", _STAGE3)
TiledLinear = unbuilt_class("deepspeed.zero.TiledLinear", _STAGE3)
TiledLinearReturnBias = unbuilt_class("deepspeed.zero.TiledLinearReturnBias", _STAGE3)
DeepSpeedZeRoOffload = unbuilt_class("deepspeed.zero.DeepSpeedZeRoOffload", _STAGE3)
