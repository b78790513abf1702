"""Helpers that scripts and other libraries import from `deepspeed.utils`."""

from deepspeed._lazy import attach
from deepspeed.utils.logging import log_dist, logger, set_log_level_from_string, should_log_le, warning_once

__all__ = ["log_dist", "logger", "set_log_level_from_string", "should_log_le", "warning_once"]

_LEAVES = ("set_z3_leaf_modules", "unset_z3_leaf_modules", "get_z3_leaf_modules", "z3_leaf_module", "z3_leaf_parameter")
_STATE = [
    f"safe_{verb}_{part}_{what}"
    for verb in ("get", "set")
    for part in ("full", "local")
    for what in ("fp32_param", "grad", "optimizer_state")
]

__getattr__, __dir__ = attach(
    __name__,
    submodules=("groups", "init_on_device", "logging", "nvtx", "tensor_fragment", "timer", "zero_to_fp32"),
    attributes={
        "OnDevice": "deepspeed.utils.init_on_device",
        "fragment_address": "deepspeed.utils.tensor_fragment",
        "RepeatingLoader": "deepspeed.runtime.dataloader",
        "instrument_w_nvtx": "deepspeed.utils.nvtx",
        "is_initialized": "deepspeed.comm",
        "init_distributed": "deepspeed.comm",
        **dict.fromkeys(_LEAVES, "deepspeed.utils.z3_leaf_module"),
        **dict.fromkeys(_STATE, "deepspeed.utils.tensor_fragment"),
    },
)
