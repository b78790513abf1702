"""The ZeRO stages by number; the original's checkpoints name this enum."""

from __future__ import annotations

from enum import Enum


class ZeroStageEnum(int, Enum):
    """What each data-parallel rank keeps only a shard of, cumulatively."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3  # noqa: PIE796  the original's alias
