"""Small helpers that scripts import from `deepspeed.runtime.utils`."""

from __future__ import annotations

from deepspeed import _native
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import log_dist

__all__ = ["memory_status", "see_memory_usage"]


def see_memory_usage(message: str, force: bool = False) -> None:
    """Logs on rank 0 what memory the device and this process hold, after `message`; nothing unless `force`."""
    if force:
        log_dist(f"{message}{memory_status()}", ranks=[0], level=30)


def memory_status() -> str:
    """Bytes on the device, the most that ever were, and those of this process by kind, in GiB."""
    device = get_accelerator()
    parts = {"device": device.memory_allocated(), "device at most": device.max_memory_allocated()}
    parts |= _native.memory_in_use()
    return "".join(f" | {name} {size / 2**30:.3f} GiB" for name, size in parts.items())
