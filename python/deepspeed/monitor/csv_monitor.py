"""Metrics as CSV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from deepspeed import _native
from deepspeed.monitor.monitor import Event, Monitor, plain


class csvMonitor(Monitor):
    """Writes one file for each tag to the folder `output_path/job_name`: lines of samples and value."""

    def __init__(self, csv_config: Any):
        super().__init__(csv_config)
        self.output_path: str = csv_config.output_path
        self.job_name: str = csv_config.job_name
        self.log_dir = os.path.join(self.output_path, self.job_name)
        self._files = _native.MetricFile.csv(self.log_dir) if self.enabled else None

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Records metrics: (tag, value, samples of all ranks so far)."""
        if self._files is not None:
            self._files.write(plain(event_list))
