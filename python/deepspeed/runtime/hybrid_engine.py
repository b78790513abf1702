"""Training and generation in one engine: not built."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.runtime.hybrid_engine", "the hybrid engine")
