"""Lightning refuses DeepSpeed on anything but a CUDAAccelerator; for tests on a CPU this is one, without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.accelerators import CUDAAccelerator as FabricCUDA
from lightning.pytorch.accelerators import CUDAAccelerator as TrainerCUDA


class _Cpu:
    def setup_device(self, device: torch.device) -> None:
        pass

    def setup(self, trainer: Any) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cpu", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "cuda"


class FabricCpu(_Cpu, FabricCUDA):
    """For Fabric."""


class TrainerCpu(_Cpu, TrainerCUDA):
    """For the Trainer."""
