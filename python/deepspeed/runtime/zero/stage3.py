"""Estimates of memory at stage 3."""

from deepspeed._features import unbuilt_function

_FEATURE = "the memory estimators"
_HERE = "deepspeed.runtime.zero.stage3"

estimate_zero3_model_states_mem_needs_all_live = unbuilt_function(
    f"{_HERE}.estimate_zero3_model_states_mem_needs_all_live", _FEATURE
)
estimate_zero3_model_states_mem_needs_all_cold = unbuilt_function(
    f"{_HERE}.estimate_zero3_model_states_mem_needs_all_cold", _FEATURE
)
