"""What a rank takes is what the memory plan said: its memory at the peak, within 5 %."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from harness import run_ranks
from resident import MIB, Residual, Watch, anonymous, shared
from variants import ADAMW, config, start

# Many small units: what a step takes for a moment, and what allocators keep of it, is a small part of the whole, as in a
# large model.
LAYERS, WIDTH = 96, 512
# Where weights are gathered, what comes and goes in a step falls into one hole after another of those that building the model has
# left in glibc's heap. It is free again, but stays in memory; it is about as much for any number of layers.
SLACK = {None: 0, "cpu:gloo": 16 * MIB}
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
    small = start(settings, Residual(1, WIDTH))
    step(small)
    small.destroy()
    before = anonymous() + shared()
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = Residual(LAYERS, WIDTH)
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
