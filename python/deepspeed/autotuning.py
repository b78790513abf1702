"""The search for a fast config: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.autotuning", "autotuning")
