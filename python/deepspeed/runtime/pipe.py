"""Pipeline parallelism: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.runtime.pipe", "pipeline parallelism")
