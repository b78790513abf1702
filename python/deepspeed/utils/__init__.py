"""Helpers that scripts and other libraries import from `deepspeed.utils`."""

from deepspeed._features import unbuilt_class, unbuilt_function
from deepspeed._lazy import attach
from deepspeed.utils.logging import log_dist, logger, set_log_level_from_string, should_log_le, warning_once

__all__ = ["log_dist", "logger", "set_log_level_from_string", "should_log_le", "warning_once"]

_STAGE3 = "ZeRO stage 3"

OnDevice = unbuilt_class("deepspeed.OnDevice", "construction of a model on the meta device")
set_z3_leaf_modules = unbuilt_function("deepspeed.utils.set_z3_leaf_modules", _STAGE3)
unset_z3_leaf_modules = unbuilt_function("deepspeed.utils.unset_z3_leaf_modules", _STAGE3)
get_z3_leaf_modules = unbuilt_function("deepspeed.utils.get_z3_leaf_modules", _STAGE3)
z3_leaf_module = unbuilt_function("deepspeed.utils.z3_leaf_module", _STAGE3)
z3_leaf_parameter = unbuilt_function("deepspeed.utils.z3_leaf_parameter", _STAGE3)

_DEBUG_API = "access to the engine's sharded state by parameter"
safe_get_full_fp32_param = unbuilt_function("deepspeed.utils.safe_get_full_fp32_param", _DEBUG_API)
safe_get_full_grad = unbuilt_function("deepspeed.utils.safe_get_full_grad", _DEBUG_API)
safe_get_full_optimizer_state = unbuilt_function("deepspeed.utils.safe_get_full_optimizer_state", _DEBUG_API)
safe_set_full_fp32_param = unbuilt_function("deepspeed.utils.safe_set_full_fp32_param", _DEBUG_API)
safe_set_full_grad = unbuilt_function("deepspeed.utils.safe_set_full_grad", _DEBUG_API)
safe_set_full_optimizer_state = unbuilt_function("deepspeed.utils.safe_set_full_optimizer_state", _DEBUG_API)
safe_get_local_fp32_param = unbuilt_function("deepspeed.utils.safe_get_local_fp32_param", _DEBUG_API)
safe_get_local_grad = unbuilt_function("deepspeed.utils.safe_get_local_grad", _DEBUG_API)
safe_get_local_optimizer_state = unbuilt_function("deepspeed.utils.safe_get_local_optimizer_state", _DEBUG_API)
safe_set_local_fp32_param = unbuilt_function("deepspeed.utils.safe_set_local_fp32_param", _DEBUG_API)
safe_set_local_grad = unbuilt_function("deepspeed.utils.safe_set_local_grad", _DEBUG_API)
safe_set_local_optimizer_state = unbuilt_function("deepspeed.utils.safe_set_local_optimizer_state", _DEBUG_API)

__getattr__, __dir__ = attach(
    __name__,
    submodules=("groups", "logging", "nvtx", "zero_to_fp32"),
    attributes={
        "RepeatingLoader": "deepspeed.runtime.dataloader",
        "instrument_w_nvtx": "deepspeed.utils.nvtx",
        "is_initialized": "deepspeed.comm",
        "init_distributed": "deepspeed.comm",
    },
)
