"""Tensor parallelism: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.runtime.tensor_parallel", "tensor parallelism")
