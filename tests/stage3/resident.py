"""How much memory this process has, at its peak too, and a model that is nothing but weights."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

MIB = 2**20
_PAGE = resource.getpagesize()


def resident() -> int:
    """Bytes of this process in memory; what it shares with others counts whole."""
    return _pages()[0]


def anonymous() -> int:
    """Bytes in memory that are no pages of files or of shared memory: heaps, tensors, the engine's buffers.

    Counted whole: of what a rank still has in common with the process that forked it, the proportion changes whenever
    one of the two writes.
    """
    everything, of_files = _pages()
    return everything - of_files


def shared() -> int:
    """Bytes of shared memory; what other processes have too counts in proportion. The kernel walks the page tables."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return next(int(kib) * 1024 for name, kib, _ in lines if name == "Pss_Shmem:")


def _pages() -> list[int]:
    """Bytes in memory, and those of them that are pages of files. The kernel has counted them: looking costs nothing."""
    return [int(pages) * _PAGE for pages in Path("/proc/self/statm").read_text().split()[1:3]]


class Watch:
    """The most that `measure`, which is asked often, gives while the context lasts."""

    def __init__(self, measure: Callable[[], int]):
        self._measure = measure

    def __enter__(self) -> Watch:
        self.peak, self._over = self._measure(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, self._measure())

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()


class Residual(nn.Module):
    """Layers whose signal neither fades nor grows."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x
