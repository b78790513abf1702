"""Quantized and LoRA linear layers: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.linear", "quantized and LoRA linear layers of DeepSpeed")
