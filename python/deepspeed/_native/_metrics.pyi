"""Metrics, timers and profiles."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, final

from deepspeed._native._engine import Engine

@final
class MetricFile:
    """A file, or a folder of files, to which metrics are written."""

    @staticmethod
    def csv(folder: str | PathLike[str]) -> MetricFile:
        """A folder with a CSV file for each metric."""

    @staticmethod
    def tensorboard(folder: str | PathLike[str]) -> MetricFile:
        """A file for TensorBoard in a folder."""

    def write(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Writes metrics: (tag, value, samples of all ranks so far)."""

def step_metrics(engine: Engine, learning_rate: float, loss: float | None = None) -> list[tuple[str, float, int]]:
    """What is known of the engine's last boundary, as metrics: (tag, value, samples of all ranks so far). `loss` is this
    rank's."""

@final
class Timer:
    """A stopwatch that adds up."""

    def __new__(cls) -> Timer:
        """A timer that has not run."""

    def start(self) -> None:
        """Begins an interval; the timer must not be running."""

    def stop(self, record: bool = True) -> None:
        """Ends the interval; `record` says whether it counts for the mean."""

    @property
    def running(self) -> bool:
        """Whether an interval is open."""

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds so far, an open interval included; with `reset` counting starts again."""

    def mean(self) -> float:
        """Mean of the recorded intervals in milliseconds; 0 before the first."""

    def reset(self) -> None:
        """Forgets everything."""

def samples_per_second(samples: int, milliseconds: float) -> float:
    """Samples per second, from milliseconds; -inf where there is no time."""

@final
class CommsLog:
    """How often each collective ran, on how many bytes, and for how long."""

    def __new__(cls, world: int, only: Sequence[str] | None = None) -> CommsLog:
        """An empty log of a group of `world` ranks, for the operations `only`, or for all."""

    def add(self, operation: str, bytes: int, seconds: float) -> str | None:
        """Adds a call of `operation` that moved `bytes` of one rank in `seconds`; returns a line that says so, or None
        where the operation is not recorded."""

    def summary(self) -> str:
        """The table of all calls."""

    def calls(self) -> list[tuple[str, int, list[float]]]:
        """By operation and bytes of one rank: the seconds of each call."""

    def reset(self) -> None:
        """Forgets all calls."""

@final
class ModuleProfile:
    """Operations, parameters and time of a model, module by module."""

    def __new__(cls, modules: Sequence[tuple[str, str, int]]) -> ModuleProfile:
        """Modules in the order of the tree, the whole model first: path, class, parameters with those inside."""

    def add_operations(self, path: str, operations: int) -> None:
        """Adds floating-point operations of the module at `path`, those inside it included."""

    def add_time(self, number: int, seconds: float) -> None:
        """Adds a call of a module, by its number."""

    def reset(self) -> None:
        """Forgets operations and times."""

    def total(self, what: str, as_text: bool) -> Any:
        """The "flops", "macs", "params" or "seconds" of the whole model; as text with its unit if `as_text`."""

    def report(self, step: int, depth: int, top: int, detailed: bool, recompute: float) -> str:
        """The report: totals, the `top` modules at each depth, and with `detailed` all down to `depth` (-1 is all)."""
