"""Sequence parallelism of Hugging Face models: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.runtime.sequence_parallel", "sequence parallelism")
