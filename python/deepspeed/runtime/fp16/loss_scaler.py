"""The loss scalers that checkpoint files of the original hold, so that `torch.load` reads these files.

They are values: the engine scales losses itself (`engine.loss_scale()`), and reads such files without these classes.
"""

from __future__ import annotations

from typing import Any


class LossScalerBase:
    """A loss scale as it was saved; what else was saved are further attributes."""

    dynamic = False

    def __init__(self, cur_scale: float, **saved: Any):
        self.cur_scale = cur_scale
        self.__dict__.update(saved)

    @property
    def loss_scale(self) -> float:
        """The factor on the loss."""
        return self.cur_scale


class LossScaler(LossScalerBase):
    """A loss scale that never changes."""


class DynamicLossScaler(LossScalerBase):
    """A loss scale that adapts."""

    dynamic = True
