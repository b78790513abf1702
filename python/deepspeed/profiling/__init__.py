"""Profilers."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, submodules=("config", "flops_profiler"))
