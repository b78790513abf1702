"""Checkpoints of sharded parameters: any stage, any world and any offload reads what any other wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from models import CASES, build
from variants import DTYPES, STAGE_3, config, digest, micro_step, start

SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 0.02, "total_num_steps": 12}}
# Each way of stage 3 to itself, from and to stage 2, and from one to the next.
PAIRS = [
    pair
    for one, other in zip(STAGE_3, STAGE_3[1:] + STAGE_3[:1], strict=True)
    for pair in ((one, one), (one, "2"), ("2", one), (one, other))
]


def begin(variant: str, precision: str, case: str, folder: str, seed: int = 11) -> Any:
    swap = Path(folder) / "swap"
    swap.mkdir(parents=True, exist_ok=True)
    return start(config(variant, precision, swap, scheduler=SCHEDULE), build(CASES[case], seed))


def run(engine: Any, case: str, precision: str, first: int, steps: int, rank: int | None = None) -> list[Any]:
    seen = []
    for index in range(first, first + steps):
        loss = micro_step(engine, CASES[case], index, DTYPES[precision], rank)
        seen.append((loss, engine.get_global_grad_norm(), engine.get_lr(), engine.loss_scale()))
    return seen


def stop_and_resume(folder: str, case: str, precision: str, pairs: list[tuple[str, str]]) -> dict[Any, Any]:
    out = {}
    for saved, loaded in pairs:
        place = f"{folder}/{saved} {loaded} {precision}"
        engine = begin(saved, precision, case, folder)
        run(engine, case, precision, 0, 3)
        engine.save_checkpoint(place, client_state={"note": saved})
        through = run(engine, case, precision, 3, 3), digest(engine.module)
        engine.destroy()
        engine = begin(loaded, precision, case, folder, seed=99)
        _, state = engine.load_checkpoint(place)
        again = run(engine, case, precision, 3, 3), digest(engine.module)
        out[saved, loaded] = (through, again, state == {"note": saved}, engine.global_steps)
        engine.destroy()
    return out


@pytest.mark.parametrize(
    ("case", "precision"), [("gpt", "fp32"), ("tied and frozen", "bf16"), ("empty", "fp16"), ("convolutions", "fp32")]
)
def test_a_resumed_run_gives_the_bits_of_one_that_never_stopped(case: str, precision: str, tmp_path: Path) -> None:
    for found in run_ranks(stop_and_resume, 2, str(tmp_path), case, precision, PAIRS, deadline=180):
        for pair, (through, again, noted, steps) in found.items():
            assert noted and steps == 6, pair
            assert through == again, pair


def write(folder: str, variant: str, case: str) -> str:
    engine = begin(variant, "bf16", case, folder)
    run(engine, case, "bf16", 0, 3, rank=0)  # the same data on every rank: the world's size does not matter
    engine.save_checkpoint(folder, "w")
    return digest(engine.module)


def read(folder: str, variant: str, case: str) -> tuple[str, str]:
    engine = begin(variant, "bf16", case, folder, seed=99)
    engine.load_checkpoint(folder)
    loaded = digest(engine.module)
    run(engine, case, "bf16", 3, 3, rank=0)
    return loaded, digest(engine.module)


@pytest.mark.parametrize("case", ["tied and frozen", "empty"])
def test_any_world_reads_what_any_other_wrote(case: str, tmp_path: Path) -> None:
    sharded = STAGE_3[0]
    finals = set()
    for writers, saved in ((1, sharded), (3, sharded), (2, "2")):
        folder = tmp_path / f"{writers}"
        written = run_ranks(write, writers, str(folder), saved, case)
        for readers, loaded in ((1, sharded), (2, "2"), (2, sharded), (4, sharded)):
            for at_load, final in run_ranks(read, readers, str(folder), loaded, case):
                assert at_load == written[0], (writers, saved, readers, loaded)
                finals.add(final)
    assert len(finals) == 1, "moments or masters were not carried over"


def weights_alone(folder: str, case: str) -> tuple[str, str, int]:
    """Only the weights are loaded, by a sharded model from a sharded one's checkpoint."""
    engine = begin(STAGE_3[0], "fp32", case, folder)
    run(engine, case, "fp32", 0, 2)
    engine.save_checkpoint(folder, "w")
    saved = digest(engine.module)
    engine.destroy()
    engine = begin(STAGE_3[0], "fp32", case, folder, seed=99)
    engine.load_checkpoint(folder, load_module_only=True)
    with torch.no_grad():
        engine(*CASES[case].batch(0, 0, torch.float32)[0])
    return saved, digest(engine.module), engine.global_steps


def test_weights_alone(tmp_path: Path) -> None:
    for saved, loaded, steps in run_ranks(weights_alone, 2, str(tmp_path), "gpt"):
        assert (saved, 0) == (loaded, steps)
