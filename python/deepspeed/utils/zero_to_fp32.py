"""Whole fp32 weights out of a sharded checkpoint."""

from deepspeed._features import unbuilt_function

_FEATURE = "reading the original's ZeRO checkpoints"

get_fp32_state_dict_from_zero_checkpoint = unbuilt_function(
    "deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint", _FEATURE
)
convert_zero_checkpoint_to_fp32_state_dict = unbuilt_function(
    "deepspeed.utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict", _FEATURE
)
load_state_dict_from_zero_checkpoint = unbuilt_function(
    "deepspeed.utils.zero_to_fp32.load_state_dict_from_zero_checkpoint", _FEATURE
)
get_model_state_file = unbuilt_function("deepspeed.utils.zero_to_fp32.get_model_state_file", _FEATURE)
get_optim_files = unbuilt_function("deepspeed.utils.zero_to_fp32.get_optim_files", _FEATURE)
