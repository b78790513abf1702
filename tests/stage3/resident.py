"""How much memory this process has, at its peak too, and a model that is nothing but weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

MIB = 2**20
WIDTH = 1024


def resident() -> int:
    """Bytes of this process in memory; what it shares with others counts in proportion."""
    return _bytes("Pss")


def without_files() -> int:
    """The same without pages of files, mostly libraries, whose part changes with every other process that has them."""
    return _bytes("Pss_Anon", "Pss_Shmem")


def private() -> int:
    """Memory that this process alone has: neither shared nor of files."""
    return _bytes("Anonymous")


def _bytes(*kinds: str) -> int:
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    found = {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in lines}
    return sum(found[kind] for kind in kinds)


class Watch:
    """The most that `measure` gives while the context lasts."""

    def __init__(self, measure: Callable[[], int] = resident):
        self._measure = measure

    def __enter__(self) -> Watch:
        self.peak, self._over = self._measure(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, self._measure())

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()


class Residual(nn.Module):
    """Layers whose signal neither fades nor grows."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x
