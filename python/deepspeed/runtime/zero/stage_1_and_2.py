"""Estimates of memory at stages 1 and 2."""

from deepspeed._features import unbuilt_function

_FEATURE = "the memory estimators"
_HERE = "deepspeed.runtime.zero.stage_1_and_2"

estimate_zero2_model_states_mem_needs_all_live = unbuilt_function(
    f"{_HERE}.estimate_zero2_model_states_mem_needs_all_live", _FEATURE
)
estimate_zero2_model_states_mem_needs_all_cold = unbuilt_function(
    f"{_HERE}.estimate_zero2_model_states_mem_needs_all_cold", _FEATURE
)
