"""Metrics for TensorBoard. Neither TensorFlow nor tensorboard is needed to write them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from deepspeed import _native
from deepspeed.monitor.monitor import Event, Monitor, plain


class TensorBoardMonitor(Monitor):
    """Writes an event file to the folder `output_path/job_name`."""

    def __init__(self, tensorboard_config: Any):
        super().__init__(tensorboard_config)
        self.output_path: str = tensorboard_config.output_path
        self.job_name: str = tensorboard_config.job_name
        folder = os.path.join(self.output_path, self.job_name)
        self.summary_writer = _native.MetricFile.tensorboard(folder) if self.enabled else None

    def write_events(self, event_list: Sequence[Event], flush: bool = True) -> None:
        """Records metrics: (tag, value, samples of all ranks so far)."""
        if self.summary_writer is not None:
            self.summary_writer.write(plain(event_list))
