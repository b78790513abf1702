"""Sampling and routing of data: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.runtime.data_pipeline", "data efficiency")
