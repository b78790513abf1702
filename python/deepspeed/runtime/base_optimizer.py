"""The base classes by which clients recognise an optimizer that DeepSpeed drives."""

from __future__ import annotations


class DeepSpeedOptimizer:
    """Whatever `deepspeed.initialize` returns as the optimizer is one of these."""


class ZeROOptimizer(DeepSpeedOptimizer):
    """An optimizer whose state is sharded over the data-parallel ranks."""
