"""Replacement of a model's layers by fused ones for inference."""

from deepspeed._features import unbuilt_class, unbuilt_function

_FEATURE = "inference kernels"

replace_transformer_layer = unbuilt_function("deepspeed.module_inject.replace_transformer_layer", _FEATURE)
revert_transformer_layer = unbuilt_function("deepspeed.module_inject.revert_transformer_layer", _FEATURE)
set_autotp_mode = unbuilt_function("deepspeed.module_inject.set_autotp_mode", "automatic tensor parallelism")
ReplaceWithTensorSlicing = unbuilt_class("deepspeed.module_inject.ReplaceWithTensorSlicing", _FEATURE)
