"""Sequence parallelism: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.sequence", "sequence parallelism")
