"""Inference engines."""

from deepspeed._features import unbuilt_class, unbuilt_function

_FEATURE = "the inference engine"

InferenceEngine = unbuilt_class("deepspeed.InferenceEngine", _FEATURE)
init_inference = unbuilt_function("deepspeed.init_inference", _FEATURE)
default_inference_config = unbuilt_function("deepspeed.default_inference_config", _FEATURE)
DeepSpeedHybridEngine = unbuilt_class("deepspeed.DeepSpeedHybridEngine", "the hybrid engine")
tp_model_init = unbuilt_function("deepspeed.tp_model_init", "automatic tensor parallelism")
DeepSpeedTransformerLayer = unbuilt_class("deepspeed.DeepSpeedTransformerLayer", "fused transformer layers")
DeepSpeedTransformerConfig = unbuilt_class("deepspeed.DeepSpeedTransformerConfig", "fused transformer layers")
