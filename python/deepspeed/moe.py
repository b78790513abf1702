"""Mixture of experts: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.moe", "mixture of experts")
