"""Metrics for Comet, by its own client."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from deepspeed.monitor.monitor import Event, Monitor, plain


class CometMonitor(Monitor):
    """Sends metrics to an experiment; needs the package `comet_ml`.

    samples_log_interval   of each metric at most one value within this many samples is sent.
    """

    def __init__(self, comet_config: Any):
        super().__init__(comet_config)
        self._interval: int = comet_config.samples_log_interval
        self._sent: dict[str, int] = {}
        self._experiment: Any = None
        if self.enabled:
            client = importlib.import_module("comet_ml")
            options = {
                "api_key": comet_config.api_key,
                "project": comet_config.project,
                "workspace": comet_config.workspace,
                "experiment_key": comet_config.experiment_key,
                "mode": comet_config.mode,
                "online": comet_config.online,
            }
            self._experiment = client.start(**{name: value for name, value in options.items() if value is not None})
            if comet_config.experiment_name is not None:
                self._experiment.set_name(comet_config.experiment_name)

    @property
    def experiment(self) -> Any:
        """The client's experiment; None on other ranks than 0."""
        return self._experiment

    @property
    def samples_log_interval(self) -> int:
        """Samples within which at most one value of a metric is sent."""
        return self._interval

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Records metrics: (tag, value, samples of all ranks so far)."""
        if self._experiment is None:
            return
        for tag, value, samples in plain(event_list):
            if tag not in self._sent or samples - self._sent[tag] >= self._interval:
                self._sent[tag] = samples
                self._experiment.log_metric(name=tag, value=value, step=samples)
