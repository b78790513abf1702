"""Learning-rate schedules."""

from collections.abc import Mapping, Sequence
from typing import Any, final

SCHEDULES: list[str]
"""The names that `scheduler.type` may have, torch's own aside."""

@final
class Schedule:
    """A learning-rate schedule with its settings: a pure function of the iteration."""

    def __new__(cls, name: str, params: Mapping[str, Any]) -> Schedule:
        """`scheduler.type` and `scheduler.params` of a config."""

    @property
    def start(self) -> int:
        """The iteration before the first: -1 unless the settings give another."""

    def at(self, iteration: int, base_lrs: Sequence[float]) -> tuple[list[float], list[tuple[float, float]] | None]:
        """Learning rate of each parameter group at `iteration`, and its betas where the schedule cycles momentum;
        `base_lrs` are the rates that the groups came with."""
