"""Chooses the accelerator: DS_ACCELERATOR, else CUDA where torch sees a device, else the CPU."""

from __future__ import annotations

import os

import torch

from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

SUPPORTED_ACCELERATOR_LIST: list[str] = ["cpu", "cuda"]

_accelerator: DeepSpeedAccelerator | None = None


def get_accelerator() -> DeepSpeedAccelerator:
    """The accelerator of this process, chosen at the first call. Makes no device context."""
    global _accelerator
    if _accelerator is None:
        _accelerator = _create(_name())
    return _accelerator


def set_accelerator(accelerator: DeepSpeedAccelerator) -> None:
    """Puts another accelerator in place of the chosen one."""
    global _accelerator
    _accelerator = accelerator


def is_current_accelerator_supported() -> bool:
    """Whether the accelerator is one of SUPPORTED_ACCELERATOR_LIST."""
    return get_accelerator().device_name() in SUPPORTED_ACCELERATOR_LIST


def _name() -> str:
    asked = os.environ.get("DS_ACCELERATOR")
    if asked is not None:
        if asked not in SUPPORTED_ACCELERATOR_LIST:
            raise ValueError(f"DS_ACCELERATOR is {asked!r}, expected one of {', '.join(SUPPORTED_ACCELERATOR_LIST)}")
        return asked
    # device_count asks the driver's management library, so it makes no context and survives a fork.
    return "cuda" if torch.cuda.device_count() > 0 else "cpu"


def _create(name: str) -> DeepSpeedAccelerator:
    return CUDA_Accelerator() if name == "cuda" else CPU_Accelerator()
