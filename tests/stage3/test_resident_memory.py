"""Stage 3 with everything on NVMe trains in a fraction of the memory that its fp32 state would take."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import run_ranks
from variants import ADAMW, config, start

MIB = 2**20
WIDTH, LAYERS = 1024, 40


def resident() -> int:
    """Bytes of this process in memory; what it shares with others counts in proportion."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss in smaps_rollup")


class Watch:
    """The greatest resident memory while the context lasts."""

    def __enter__(self) -> Watch:
        self.peak, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, resident())

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
            x = x + layer(x) / LAYERS
        return x


def train(folder: str) -> dict[str, float]:
    import deepspeed

    nvme = {"device": "nvme", "nvme_path": folder}
    zero = {
        "stage": 3,
        "reduce_bucket_size": WIDTH * WIDTH,
        "offload_optimizer": nvme,
        "offload_param": {**nvme, "max_in_cpu": 0},
    }
    settings = config("3", "bf16", optimizer=ADAMW, zero_optimization=zero)

    def step(engine: Any) -> float:
        loss = engine(torch.full((2, WIDTH), 0.1, dtype=torch.bfloat16)).float().square().mean()
        engine.backward(loss)
        engine.step()
        return loss.item()

    # What torch, the engine's threads and the first step of any model take is not the model's.
    small = start(settings, Residual(1))
    step(small)
    small.destroy()
    before = resident()

    torch.manual_seed(1)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        built = Residual(LAYERS)
    engine = start(settings, built)
    step(engine)
    with Watch() as watch:
        losses = [step(engine) for _ in range(3)]
    grown = watch.peak - before
    engine.destroy()
    return {"first": losses[0], "last": losses[-1], "grown": grown}


@pytest.mark.parametrize("world", [1, 2])
def test_everything_on_nvme_stays_under_a_quarter_of_the_fp32_state(world: int, tmp_path: Path) -> None:
    # Master weights and Adam's two moments.
    state = 3 * 4 * LAYERS * WIDTH * WIDTH
    found = run_ranks(train, world, str(tmp_path), deadline=120)
    assert all(rank["last"] != rank["first"] for rank in found), "the model trains"
    total = sum(rank["grown"] for rank in found)
    assert 0 < total < state / 4, f"{total / MIB:.0f} MiB of {state / MIB:.0f} MiB"
