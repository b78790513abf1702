"""Bytes between ranks by torch.distributed: what the native engine uses where ranks share no memory.

The engine reduces in Rust, in fp32 and in rank order, so what is needed here only moves bytes; numbers are the same
whatever the backend. Who waits how long, and what is said then, is decided there, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_boards = itertools.count()


class TorchTransport:
    """Called by the native engine with addresses of its own memory, on the thread that called the engine.

    The first three methods begin a transfer; `wait` tells when it is over. The memory stays where it is until then.
    """

    def __init__(self) -> None:
        # NCCL moves device memory only; the bytes take a detour over it.
        self._device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        self._work: Any = None
        self._landed: tuple[torch.Tensor, torch.Tensor] | None = None

    def all_to_all(self, send: int, receive: int, length: int) -> None:
        """Part r of `send` goes to rank r; part r of `receive` comes from it. `length` bytes in all."""
        self._begin(dist.all_to_all_single, _bytes(receive, length), _bytes(send, length))

    def all_gather(self, send: int, receive: int, length: int) -> None:
        """Every rank's `length` bytes, in rank order, into `receive`."""
        self._begin(dist.all_gather_into_tensor, _bytes(receive, length * dist.get_world_size()), _bytes(send, length))

    def broadcast(self, data: int, length: int, root: int) -> None:
        """Rank `root`'s bytes on every rank."""
        memory = _bytes(data, length)
        moved = memory.to(self._device) if self._device else memory
        self._landed = (memory, moved)
        self._work = dist.broadcast(moved, src=root, async_op=True)

    def wait(self, seconds: float) -> bool:
        """Waits for what was begun last, at most so long; whether it is over."""
        if self._device is not None:
            # NCCL's own wait with a time-out would tear the communicator down at its end.
            return self._poll(seconds) and self._finish()
        try:
            self._work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if not self._work.is_completed():
                return False
            # It ended at the last moment, or badly: then this raises what went wrong.
            self._work.wait()
        return self._finish()

    def abandon(self) -> None:
        """Nobody waits for what was begun last: the end of the program does not either."""
        if self._work is not None and not self._work.is_completed():
            # torch ends a process group by waiting for its transfers, and the peers of this one may never come.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))

    def _begin(self, collective: Callable[..., Any], output: torch.Tensor, source: torch.Tensor) -> None:
        moved = output if self._device is None else torch.empty_like(output, device=self._device)
        self._landed = (output, moved)
        self._work = collective(moved, source if self._device is None else source.to(self._device), async_op=True)

    def _poll(self, seconds: float) -> bool:
        until, pause = time.monotonic() + seconds, 0.0
        while not self._work.is_completed():
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(0.001, pause * 2 + 0.00001)
        self._work.wait()
        return True

    def _finish(self) -> bool:
        memory, moved = self._landed or (None, None)
        if memory is not None and moved is not None and moved is not memory:
            memory.copy_(moved)
        self._work = self._landed = None
        return True


class StoreBoard:
    """Where ranks leave word for each other while a collective waits: a corner of torch's store.

    Called by a thread of the native engine's. Keys are text, values bytes.
    """

    def __init__(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own, which nobody holds while waiting for a key; a store in memory or in a file has none.
        with contextlib.suppress(AttributeError, RuntimeError):
            store = store.clone()
        # Ranks make their groups in the same order.
        self._store = dist.PrefixStore(f"deepspeed/board{next(_boards)}", store)

    def put(self, key: str, value: bytes) -> None:
        """Sets a key."""
        self._store.set(key, value)  # type: ignore[arg-type]  # bytes are taken, too

    def get(self, keys: list[str]) -> list[bytes | None]:
        """The values of keys; None where they were not set."""
        if self._store.check(keys):
            return list(self._store.multi_get(keys))
        return [self._store.get(key) if self._store.check([key]) else None for key in keys]

    def claim(self, key: str, value: bytes) -> bytes:
        """Sets a key unless it was set before; what it holds then."""
        return self._store.compare_set(key, "", value)  # type: ignore[arg-type]


def _bytes(address: int, length: int) -> torch.Tensor:
    if length == 0:  # torch.frombuffer refuses it, and a parameter may have no elements
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)
