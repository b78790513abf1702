"""What a monitor is, and the one that hands metrics to all that a config asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch.distributed as dist

# (tag, value, where it stands on the horizontal axis: samples of all ranks so far).
Event: TypeAlias = tuple[str, Any, int]


class Monitor(ABC):
    """Takes metrics. `monitor_config` is its block of the config; only rank 0 writes."""

    def __init__(self, monitor_config: Any):
        self.monitor_config = monitor_config
        self.enabled: bool = monitor_config.enabled and _rank() == 0

    @abstractmethod
    def write_events(self, event_list: Sequence[Event]) -> None:
        """Records metrics: (tag, value, samples of all ranks so far)."""


class MonitorMaster(Monitor):
    """All monitors that a config asks for.

    tb_monitor, csv_monitor, wandb_monitor, comet_monitor   the single ones; None where they are off.
    """

    def __init__(self, monitor_config: Any):
        super().__init__(monitor_config)
        self.tb_monitor = self.csv_monitor = self.wandb_monitor = self.comet_monitor = None
        if not self.enabled:
            return
        if monitor_config.tensorboard.enabled:
            from deepspeed.monitor.tensorboard import TensorBoardMonitor

            self.tb_monitor = TensorBoardMonitor(monitor_config.tensorboard)
        if monitor_config.csv_monitor.enabled:
            from deepspeed.monitor.csv_monitor import csvMonitor

            self.csv_monitor = csvMonitor(monitor_config.csv_monitor)
        if monitor_config.wandb.enabled:
            from deepspeed.monitor.wandb import WandbMonitor

            self.wandb_monitor = WandbMonitor(monitor_config.wandb)
        if monitor_config.comet.enabled:
            from deepspeed.monitor.comet import CometMonitor

            self.comet_monitor = CometMonitor(monitor_config.comet)

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Records metrics with all monitors: (tag, value, samples of all ranks so far)."""
        for monitor in (self.tb_monitor, self.csv_monitor, self.wandb_monitor, self.comet_monitor):
            if monitor is not None:
                monitor.write_events(event_list)


def plain(event_list: Sequence[Event]) -> list[tuple[str, float, int]]:
    """Metrics whose values are Python's own numbers."""
    return [(tag, float(value), int(samples)) for tag, value, samples in event_list]


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
