"""Stage-3 sharded parameters, under the module path by which clients import their parts."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed._features import unbuilt_class, unbuilt_function
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.construction import Init, shutdown_init_context
from deepspeed.runtime.zero.gathering import GatheredParameters
from deepspeed.runtime.zero.sharded_parameter import ZeroParamStatus, ZeroParamType, is_sharded

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "get_accelerator",
    "is_zero_param",
    "register_external_parameter",
    "shutdown_init_context",
    "unregister_external_parameter",
    "unwrap_model_for_generation",
    "zero_wrapper_for_fp_tensor_constructor",
]

_orig_torch_arange = torch.arange


def is_zero_param(parameter: Any) -> bool:
    """Whether stage 3 keeps this parameter."""
    return is_sharded(parameter)


def zero_wrapper_for_fp_tensor_constructor(function: Any, _dtype: torch.dtype) -> Any:
    """Tensors are made as torch makes them, and cast when they are moved; clients replace this name."""
    return function


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Says that `module` computes with a parameter of another module. Nothing has to follow: whoever reads a parameter that
    is not whole gathers it."""
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError(f"expected a torch.nn.Parameter, got {type(parameter).__name__}")


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Takes `register_external_parameter` back."""
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError(f"expected a torch.nn.Parameter, got {type(parameter).__name__}")


_STAGE3 = "ZeRO stage 3's module wrappers"
unwrap_model_for_generation = unbuilt_function("deepspeed.zero.unwrap_model_for_generation", _STAGE3)
TiledLinear = unbuilt_class("deepspeed.zero.TiledLinear", _STAGE3)
TiledLinearReturnBias = unbuilt_class("deepspeed.zero.TiledLinearReturnBias", _STAGE3)
DeepSpeedZeRoOffload = unbuilt_class("deepspeed.zero.DeepSpeedZeRoOffload", _STAGE3)
