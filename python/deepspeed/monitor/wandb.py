"""Metrics for Weights & Biases, by its own client."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from deepspeed.monitor.monitor import Event, Monitor, plain


class WandbMonitor(Monitor):
    """Sends metrics to a run of `project`, `group` and `team`; needs the package `wandb`."""

    def __init__(self, wandb_config: Any):
        super().__init__(wandb_config)
        self.project, self.group, self.team = wandb_config.project, wandb_config.group, wandb_config.team
        self._client: Any = None
        if self.enabled:
            # By its full name: this module is called wandb, too.
            self._client = importlib.import_module("wandb")
            self._client.init(project=self.project, group=self.group, entity=self.team)

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Sends values by name, at `step`."""
        if self._client is not None:
            self._client.log(data, step=step, commit=commit)

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Records metrics: (tag, value, samples of all ranks so far)."""
        for tag, value, samples in plain(event_list):
            self.log({tag: value}, step=samples)
