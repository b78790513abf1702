"""The block `zero_optimization` of a config, as attributes, and the ZeRO stages by number."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

from deepspeed._native import Config

_OFFLOADS = ("offload_param", "offload_optimizer")


def zero_settings(config: Config, judged: dict[str, Any]) -> SimpleNamespace:
    """The settings of a judged config without the prefix `stage3_`; `.offload_param` and `.offload_optimizer` are None where
    they are not in it. What is in `judged` is taken from there."""
    found = {name.removeprefix("stage3_"): value for name, value in config.block("zero_optimization").items()}
    for name in _OFFLOADS:
        if found[name] is not None:
            found[name] = SimpleNamespace(**config.block(f"zero_optimization.{name}"))
    return SimpleNamespace(**{**found, **judged})


class ZeroStageEnum(int, Enum):
    """The stages, as the original's checkpoints name them: what each data-parallel rank keeps only a shard of, cumulatively."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3  # noqa: PIE796  the original's alias
