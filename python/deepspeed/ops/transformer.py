"""Fused transformer layers: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.ops.transformer", "fused transformer layers")
