"""Timers by name, and samples per second. Times are wall-clock, in milliseconds, after the device has finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepspeed import _native
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import log_dist


class SynchronizedWallClockTimer:
    """Timers by name: `timers("load").start()`, `.stop()`, `.elapsed()`."""

    class Timer:
        """One timer: intervals between start() and stop() add up."""

        def __init__(self, name: str):
            self.name_ = name
            self._timer = _native.Timer()

        @property
        def started_(self) -> bool:
            """Whether it is running."""
            return self._timer.running

        def start(self) -> None:
            """Begins an interval."""
            get_accelerator().synchronize()
            self._timer.start()

        def stop(self, reset: bool = False, record: bool = True) -> None:
            """Ends the interval, which counts for `mean` if `record`; `reset` forgets those before it."""
            get_accelerator().synchronize()
            if reset:
                self._timer.elapsed(reset=True)
            self._timer.stop(record)

        def reset(self) -> None:
            """Forgets everything."""
            self._timer.reset()

        def elapsed(self, reset: bool = True) -> float:
            """Milliseconds so far; `reset` counts from here on."""
            return self._timer.elapsed(reset)

        def mean(self) -> float:
            """Mean of the recorded intervals, in milliseconds."""
            return self._timer.mean()

    def __init__(self) -> None:
        self.timers: dict[str, SynchronizedWallClockTimer.Timer] = {}

    def __call__(self, name: str) -> SynchronizedWallClockTimer.Timer:
        """The timer of this name, made on first use."""
        return self.timers.setdefault(name, self.Timer(name))

    def get_timers(self) -> dict[str, SynchronizedWallClockTimer.Timer]:
        """All timers, by name."""
        return self.timers

    def has_timer(self, name: str) -> bool:
        """Whether there is a timer of this name."""
        return name in self.timers

    @staticmethod
    def memory_usage() -> str:
        """Memory that is allocated on the device, and the most that ever was."""
        device = get_accelerator()
        now, most = device.memory_allocated() / 2**30, device.max_memory_allocated() / 2**30
        return f" | memory {now:.4f} GiB, at most {most:.4f} GiB"

    def log(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Logs the milliseconds of these timers, divided by `normalizer`, on `ranks` (rank 0 by default)."""
        assert normalizer > 0.0, f"normalizer={normalizer} must be above 0"
        times = [
            f"{name}: {self.timers[name].elapsed(reset) / normalizer:.2f}" for name in names if name in self.timers
        ]
        memory = self.memory_usage() if memory_breakdown else ""
        log_dist("time (ms) | " + " | ".join(times) + memory, ranks=ranks or [0])

    def get_mean(self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Mean interval of these timers in milliseconds, divided by `normalizer`."""
        assert normalizer > 0.0, f"normalizer={normalizer} must be above 0"
        found = {name: self.timers[name].mean() / normalizer for name in names if name in self.timers}
        if reset:
            for name in found:
                self.timers[name].reset()
        return found


class ThroughputTimer:
    """Samples per second over the steps between `start()` and `stop()`.

    config           with `enabled`, and `synchronized`: wait for the device before a time is taken; None is both.
    batch_size       samples of one call of stop(global_step=True), all ranks together.
    start_step       steps that do not count: the first ones are slow.
    steps_per_output steps between two lines; None is silent.
    logging_fn       what takes the lines.
    """

    def __init__(
        self,
        config: Any = None,
        batch_size: int = 1,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], None] | None = None,
    ):
        self.config = config
        self.enabled: bool = getattr(config, "enabled", True)
        self.synchronized: bool = getattr(config, "synchronized", True)
        self.batch_size, self.start_step, self.steps_per_output = batch_size, start_step, steps_per_output
        self.logging = logging_fn or (lambda line: log_dist(line, ranks=[0]))
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self._timer = _native.Timer()
        self._counted = 0

    def update_epoch_count(self) -> None:
        """An epoch is over."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """A step begins."""
        if self.enabled and not self._timer.running and self.global_step_count >= self.start_step:
            self._wait()
            self._timer.start()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """A micro-batch is over; with `global_step` an update, too."""
        if not self.enabled:
            return
        self.micro_step_count += 1
        if not global_step:
            return
        self.global_step_count += 1
        if not self._timer.running:
            return
        self._wait()
        self._timer.stop()
        self._counted += 1
        if report_speed and self.steps_per_output and self.global_step_count % self.steps_per_output == 0:
            self.logging(
                f"epoch {self.epoch_count}, step {self.global_step_count}: {self.avg_samples_per_sec():.2f} samples/s"
            )

    def _wait(self) -> None:
        if self.synchronized:
            get_accelerator().synchronize()

    def avg_samples_per_sec(self) -> float:
        """Samples of all ranks per second, over the steps that count; -inf before the first."""
        return _native.samples_per_second(self.batch_size * self._counted, self._timer.elapsed(reset=False))
