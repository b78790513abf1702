"""Bytes between ranks by torch.distributed: what the native engine uses where ranks share no memory.

The engine reduces in Rust, in fp32 and in rank order, so what is needed here only moves bytes; numbers are the same
whatever the backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class TorchTransport:
    """Called by the native engine with addresses of its own memory, on the thread that called the engine."""

    def __init__(self) -> None:
        # NCCL moves device memory only; the bytes take a detour over it.
        self._device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None

    def all_to_all(self, send: int, receive: int, length: int) -> None:
        """Part r of `send` goes to rank r; part r of `receive` comes from it. `length` bytes in all."""
        self._run(dist.all_to_all_single, _bytes(receive, length), _bytes(send, length))

    def all_gather(self, send: int, receive: int, length: int) -> None:
        """Every rank's `length` bytes, in rank order, into `receive`."""
        self._run(dist.all_gather_into_tensor, _bytes(receive, length * dist.get_world_size()), _bytes(send, length))

    def broadcast(self, data: int, length: int, root: int) -> None:
        """Rank `root`'s bytes on every rank."""
        memory = _bytes(data, length)
        moved = memory.to(self._device) if self._device else memory
        dist.broadcast(moved, src=root)
        if self._device:
            memory.copy_(moved)

    def _run(self, collective: Callable[..., Any], output: torch.Tensor, source: torch.Tensor) -> None:
        if self._device is None:
            collective(output, source)
            return
        moved = torch.empty_like(output, device=self._device)
        collective(moved, source.to(self._device))
        output.copy_(moved)


def _bytes(address: int, length: int) -> torch.Tensor:
    if length == 0:  # torch.frombuffer refuses it, and a parameter may have no elements
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)
