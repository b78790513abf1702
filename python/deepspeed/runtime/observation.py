"""What the engine shows of itself to other programs: metrics to monitors, a profile of one step, samples per second."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from deepspeed import _native
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils.timer import ThroughputTimer

# The tags of times, and the names of the original's timers.
_PHASES = {
    f"Train/Samples/elapsed_time_ms_{tag}": name
    for tag, name in (
        ("forward", "fwd"),
        ("backward", "bwd"),
        ("backward_inner", "bwd_inner"),
        ("backward_allreduce", "bwd_allreduce"),
        ("step", "step"),
    )
}


class Observation:
    """Watches the steps of one engine. Only rank 0 writes and profiles."""

    def __init__(self, config: DeepSpeedConfig, module: torch.nn.Module, rank: int):
        self.monitor = MonitorMaster(config.monitor_config)
        # Waiting for the device would slow down every step.
        settings = SimpleNamespace(enabled=True, synchronized=False)
        self.throughput = ThroughputTimer(settings, batch_size=config.train_batch_size)
        self.flops_profiler: Any = None
        # Milliseconds of a step by phase, as the last step line told them.
        self.phases: dict[str, float] = {}
        self._breakdown = config.wall_clock_breakdown
        self._settings = config.flops_profiler_config
        self._loss: torch.Tensor | None = None
        self._step = 1
        self._profiled = False
        if self._settings.enabled and rank == 0:
            from deepspeed.profiling.flops_profiler import FlopsProfiler

            self.flops_profiler = FlopsProfiler(module, recompute_fwd_factor=self._settings.recompute_fwd_factor)

    def run(self, module: torch.nn.Module, inputs: Any, kwargs: Any) -> Any:
        """Calls the module; profiles the first call of the step that the config names."""
        self.throughput.start()
        profiler = self.flops_profiler
        if profiler is None or self._profiled or self._step != self._settings.profile_step or not module.training:
            return module(*inputs, **kwargs)
        self._profiled = True
        profiler.start_profile()
        try:
            return module(*inputs, **kwargs)
        finally:
            profiler.stop_profile()

    def saw_loss(self, loss: torch.Tensor) -> None:
        """The loss of a backward pass."""
        if self.monitor.enabled:
            self._loss = loss.detach()

    def after_step(self, native: _native.Engine, rate: float) -> None:
        """A boundary was passed, with this learning rate."""
        self.throughput.stop(global_step=True)
        if self.monitor.enabled or self._breakdown:
            loss = None if self._loss is None else self._loss.item()
            events = _native.step_metrics(native, rate, loss)
            self.monitor.write_events(events)
            times = {_PHASES[tag]: value for tag, value, _ in events if tag in _PHASES}
            self.phases = times or self.phases
        if self._profiled and self._step == self._settings.profile_step:
            block = self._settings
            self.flops_profiler.print_model_profile(
                block.profile_step, block.module_depth, block.top_modules, block.detailed, block.output_file
            )
        self._step += 1
