"""The whole job is killed at random instants of saving; the next one goes on as if nothing had happened.

The two hundred kills are those of crates/engine/tests/crash.rs; these few go through the engine's public face.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import toys  # noqa: F401  puts the toy models on the path of the ranks

from harness import run_outcomes, run_ranks
from toy import build, config, digest, micro_step, start

STEPS = 400


def begin(stage: int, block: dict[str, Any], seed: int = 7) -> Any:
    return start(config(stage, "bf16", checkpoint=block), build(seed=seed))


def save_until_killed(folder: str, stage: int, block: dict[str, Any], moment: float) -> None:
    engine = begin(stage, block, seed=99)
    path, _ = engine.load_checkpoint(folder)
    if path is None:
        engine.destroy()
        engine = begin(stage, block)
    signs = Path(folder, f"signs-{moment}")
    signs.mkdir(parents=True, exist_ok=True)

    def die() -> None:
        # All ranks at one instant, counted from when the last of them has saved once. Whoever wakes first kills the others, too: a
        # rank that is late on a busy machine would see the other go, and end with an error instead.
        while len(pids := [int(name) for name in os.listdir(signs)]) < 2:
            time.sleep(0.001)
        time.sleep(moment)
        for pid in sorted(pids, key=os.getpid().__eq__):
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()
    first = engine.global_steps
    for index in range(first, STEPS):
        micro_step(engine, index)
        engine.save_checkpoint(folder)
        if index == first:
            # There is something to go on from before anybody is killed.
            engine.wait_for_checkpoint()
            (signs / str(os.getpid())).touch()


def go_on(folder: str, stage: int, block: dict[str, Any]) -> tuple[int, str, float]:
    engine = begin(stage, block, seed=99)
    engine.load_checkpoint(folder)
    steps = engine.global_steps
    micro_step(engine, steps)
    loss = micro_step(engine, steps + 1)
    return steps, digest(engine.module), loss


def through(stage: int, stops: list[int]) -> list[tuple[int, str, float]]:
    """What an uninterrupted run has two steps after each of `stops`."""
    engine = begin(stage, {})
    out = []
    for index in range(max(stops) + 2):
        loss = micro_step(engine, index)
        if index + 1 - 2 in stops:
            out.append((index + 1 - 2, digest(engine.module), loss))
    return out


@pytest.mark.parametrize(
    ("stage", "block"), [(2, {"async": True, "keep_last": 2}), (3, {"keep_last": 2})], ids=["behind", "waiting"]
)
def test_a_job_that_is_killed_goes_on(tmp_path: Path, stage: int, block: dict[str, Any]) -> None:
    found = []
    for _ in range(2):
        moment = random.uniform(0.0, 0.12)
        outcomes = run_outcomes(save_until_killed, 2, str(tmp_path), stage, block, moment, deadline=60)
        assert all(outcome.exit_code == -signal.SIGKILL for outcome in outcomes), [o.describe() for o in outcomes]
        one, other = run_ranks(go_on, 2, str(tmp_path), stage, block)
        assert one[:2] == other[:2]
        found.append(one)
    stops = [steps for steps, _, _ in found]
    assert stops == sorted(stops) and stops[0] > 0
    whole = {steps: rest for steps, *rest in run_ranks(through, 2, stage, stops)[0]}
    for steps, *rest in found:
        assert rest == whole[steps], steps
