"""What a rank takes is what the memory plan said: its memory at the peak, within 5 % and what an allocator keeps."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from harness import run_ranks
from resident import MIB, WIDTH, Residual, Watch, anonymous, shared
from variants import ADAMW, config, start

LAYERS = 24
# glibc keeps freed buffers in the arena of each thread that used them, Gloo's among them; that does not grow with the model.
SLACK = {None: 24 * MIB, "cpu:gloo": 48 * MIB}
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def planned(engine: Any) -> float:
    """Bytes of host memory that the plan gives a rank."""
    line = engine._native.memory_line()
    found = re.search(r"([\d.]+) (\w+) planned", line)
    assert found is not None, line
    return float(found[1]) * UNITS[found[2]]


def peak_and_plan(stage: int, precision: str, backend: str | None) -> tuple[float, float]:
    """Bytes that the model and its training take at most, and what the plan says."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    zero = {
        "stage": stage,
        "reduce_bucket_size": WIDTH * WIDTH,
        "stage3_max_live_parameters": 4 * WIDTH * WIDTH,
        "stage3_prefetch_bucket_size": WIDTH * WIDTH,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
    settings = config("3", precision, optimizer=ADAMW, zero_optimization=zero)

    def step(engine: Any) -> None:
        dtype = next(engine.module.parameters()).dtype
        engine.backward(engine(torch.full((2, WIDTH), 0.1, dtype=dtype)).float().square().mean())
        engine.step()

    # What torch, the engine's threads and the first step of any model take is not the model's.
    small = start(settings, Residual(1))
    step(small)
    small.destroy()
    before = anonymous() + shared()
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = Residual(LAYERS)
    engine = start(settings, model)
    with Watch(anonymous) as watch:
        for _ in range(3):
            step(engine)
    # Shared memory, once touched, stays.
    return watch.peak + shared() - before, planned(engine)


@pytest.mark.parametrize(
    ("stage", "precision", "world", "backend"),
    [(0, "bf16", 1, None), (2, "fp32", 2, None), (3, "bf16", 2, None), (3, "bf16", 2, "cpu:gloo")],
)
def test_the_peak_is_what_was_planned(stage: int, precision: str, world: int, backend: str | None) -> None:
    for peak, plan in run_ranks(peak_and_plan, world, stage, precision, backend, deadline=120):
        assert abs(peak - plan) <= 0.05 * plan + SLACK[backend], (
            f"{peak / MIB:.0f} MiB at most, {plan / MIB:.0f} MiB planned"
        )
