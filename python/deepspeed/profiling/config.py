"""The block `flops_profiler` of a config, as attributes."""

from __future__ import annotations

from types import SimpleNamespace

from deepspeed._native import Config


def flops_profiler_settings(config: Config) -> SimpleNamespace:
    """The settings of a judged config: `.enabled`, `.profile_step`, `.module_depth`, ..."""
    return SimpleNamespace(**config.block("flops_profiler"))
