"""Compression: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.compression", "compression (the original removed it, too)")
