"""Stage 3 with everything on NVMe trains in a fraction of the memory that its fp32 state would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from resident import MIB, Residual, Watch, resident
from variants import ADAMW, config, start

LAYERS, WIDTH = 40, 1024


def train(folder: str, backend: str | None) -> dict[str, float]:
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    nvme = {"device": "nvme", "nvme_path": folder}
    zero = {
        "stage": 3,
        "reduce_bucket_size": WIDTH * WIDTH,
        "stage3_max_live_parameters": 2 * WIDTH * WIDTH,
        "stage3_max_reuse_distance": 0,
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
    small = start(settings, Residual(1, WIDTH))
    step(small)
    small.destroy()
    before = resident()

    torch.manual_seed(1)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        built = Residual(LAYERS, WIDTH)
    engine = start(settings, built)
    step(engine)
    with Watch(resident) as watch:
        losses = [step(engine) for _ in range(2)]
    grown = watch.peak - before
    engine.destroy()
    return {"first": losses[0], "last": losses[-1], "grown": grown}


@pytest.mark.parametrize(("world", "backend"), [(1, None), (2, None), (2, "cpu:gloo")])
def test_everything_on_nvme_stays_under_a_quarter_of_the_fp32_state(
    world: int, backend: str | None, tmp_path: Path
) -> None:
    # Master weights and Adam's two moments.
    state = 3 * 4 * LAYERS * WIDTH * WIDTH
    found = run_ranks(train, world, str(tmp_path), backend, deadline=120)
    assert all(rank["last"] != rank["first"] for rank in found), "the model trains"
    on_host = sum(rank["grown"] for rank in found)
    assert 0 < on_host < state / 4, f"{on_host / MIB:.0f} MiB of {state / MIB:.0f} MiB"
