"""The host's processors."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Any

from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_KIB = 1024


class CPU_Accelerator(DeepSpeedAccelerator):
    """The CPU as a device: rank-local numbers stand for devices, memory is this process's resident memory."""

    _name = "cpu"
    _communication_backend_name = "gloo"

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        """Ranks on this host (LOCAL_SIZE), else the processors this process may run on."""
        local_size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
        return int(local_size) if local_size else len(os.sched_getaffinity(0))

    def device_name(self, device_index: int | None = None) -> str:
        """ "cpu", whichever index: torch has one CPU device."""
        return self._name

    def current_device(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def current_device_name(self) -> str:
        return self._name

    def set_device(self, device_index: int) -> None:
        """Nothing to set: processes share the processors."""

    def device(self, device_index: int | None = None) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def visible_devices_envs(self) -> list[str]:
        return ["CUDA_VISIBLE_DEVICES"]

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Resident memory of this process."""
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * _PAGE_BYTES

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The largest resident memory of this process so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB

    def total_memory(self, device_index: int | None = None) -> int:
        """The host's memory."""
        return os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES

    def available_memory(self, device_index: int | None = None) -> int:
        """The host's free memory."""
        return os.sysconf("SC_AVPHYS_PAGES") * _PAGE_BYTES
