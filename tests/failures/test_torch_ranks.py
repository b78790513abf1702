"""Ranks that go separate ways where torch.distributed (Gloo) carries the bytes: who is missing is named, as on shared
memory, and all ranks say the same."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import job
from harness import run_command, run_outcomes, run_ranks
from toy import config, micro_step, start

DEADLINE_S = 6.0


def over_gloo(stage: int = 2, timeout: float = DEADLINE_S) -> Any:
    import deepspeed

    deepspeed.init_distributed("cpu:gloo", timeout=timedelta(seconds=timeout))
    engine = start(config(stage))
    assert "gloo" in engine._group.transport
    return engine


def warnings_of_the_engine() -> list[str]:
    from deepspeed.utils import logger

    messages: list[str] = []
    logger.warning = lambda text, *args, **_: messages.append(text % args if args else text)  # type: ignore[method-assign]
    return messages


def step_until_error(engine: Any, limit: int = 1000) -> str:
    try:
        for index in range(limit):
            micro_step(engine, index)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# -- a rank that is elsewhere ------------------------------------------------------------------------------------------


def one_is_elsewhere() -> dict[str, Any]:
    messages = warnings_of_the_engine()
    engine = over_gloo()
    micro_step(engine, 0)
    began = time.monotonic()
    if engine.global_rank == 1:
        engine._group.set_activity("reading the data set")
        time.sleep(DEADLINE_S + 3)
    error = step_until_error(engine)
    waited = time.monotonic() - began
    again = step_until_error(engine, 1)
    return {"error": error, "again": again, "waited": waited, "warnings": [m for m in messages if "waiting for" in m]}


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_is_elsewhere_is_named_and_all_say_the_same(world: int) -> None:
    found = run_ranks(one_is_elsewhere, world, deadline=60)
    for rank, it in enumerate(found):
        assert it["error"] == found[0]["error"], f"rank {rank} says something else: {it['error']}"
        assert it["error"].startswith("CommError: rank 1 has not reached "), it["error"]
        assert "it is in reading the data set; waited" in it["error"]
        assert it["again"] == it["error"], "the first error is kept"
        assert it["waited"] < DEADLINE_S + 10
        if rank != 1:
            assert len(it["warnings"]) == 1, it["warnings"]
            assert "rank 1 has not reached " in it["warnings"][0]
            assert "reading the data set" in it["warnings"][0]


def a_slow_one() -> tuple[str, int]:
    messages = warnings_of_the_engine()
    engine = over_gloo(timeout=60)
    micro_step(engine, 0)
    if engine.global_rank == 1:
        time.sleep(7)
    return step_until_error(engine, 2), len([m for m in messages if "waiting for" in m])


def test_a_rank_that_comes_late_is_only_warned_of() -> None:
    (error, warnings), (other, none) = run_ranks(a_slow_one, 2, deadline=60)
    assert (error, other) == ("", "")
    assert (warnings, none) == (1, 0)


# -- a rank that goes --------------------------------------------------------------------------------------------------


def one_goes(how: str, victim: int) -> str:
    engine = over_gloo(1)
    for index in range(1000):
        if engine.global_rank == victim and index == 3:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise KeyError("the reason")
            return ""
        micro_step(engine, index)
    return "no error"


@pytest.mark.parametrize("how", ["dies", "raises", "returns"])
@pytest.mark.parametrize(("world", "victim"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_rank_that_has_gone_is_named(how: str, world: int, victim: int) -> None:
    outcomes = run_outcomes(one_goes, world, how, victim, deadline=40, grace=15)
    errors = {outcome.error for rank, outcome in enumerate(outcomes) if rank != victim}
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert outcome.error_type == "CommError", outcome.describe()
            assert outcome.seconds < 30, outcome.describe()
    assert any(error.startswith(f"rank {victim} (pid ") for error in errors), errors
    if victim != 0:  # else what rank 0 kept for the others is gone, too
        assert len(errors) == 1, errors


def one_drops_its_engine() -> str:
    engine = over_gloo(1, timeout=60)
    micro_step(engine, 0)
    if engine.global_rank == 1:
        engine.destroy()
        del engine
        gc.collect()
        time.sleep(8)
        return ""
    return step_until_error(engine)


def test_a_rank_that_drops_its_engine_is_named() -> None:
    error, _ = run_ranks(one_drops_its_engine, 2, deadline=40)
    assert "rank 1 (pid " in error and "left the group before it finished" in error, error


# -- ranks that disagree -----------------------------------------------------------------------------------------------


def different_calls() -> str:
    engine = over_gloo(timeout=60)
    micro_step(engine, 0)
    if engine.global_rank == 1:
        try:
            engine._group.barrier("the end of the epoch")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return step_until_error(engine)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_in_different_calls_are_told_of_both(world: int) -> None:
    errors = run_ranks(different_calls, world, deadline=40)
    assert len(set(errors)) == 1, errors
    assert errors[0].startswith("CommError: ranks disagree: "), errors
    assert "barrier" in errors[0] and "the end of the epoch" in errors[0] and "reduce_scatter" in errors[0], errors


# -- signals -----------------------------------------------------------------------------------------------------------


class Alarm(Exception):
    """Raised by a signal's handler."""


def interrupted_wait() -> tuple[str, float]:
    engine = over_gloo(timeout=60)
    micro_step(engine, 0)
    began = time.monotonic()
    if engine.global_rank == 1:

        def ring(*_: Any) -> None:
            raise Alarm("time for something else")

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 1.5)
    else:
        time.sleep(6)
    return step_until_error(engine), time.monotonic() - began


def test_a_signals_handler_ends_the_wait() -> None:
    (other, _), (error, seconds) = run_ranks(interrupted_wait, 2, deadline=40)
    assert error == "Alarm: time for something else"
    assert seconds < 5
    assert other.startswith("CommError: rank 1 was interrupted in "), other


# -- the end of the program --------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch
sys.path.insert(0, {toys!r})
from toy import config, micro_step, start
import deepspeed
deepspeed.init_distributed("cpu:gloo", timeout=timedelta(seconds=120))
engine = start(config(1))
for index in range(3):
    micro_step(engine, index)
if "apart" in sys.argv and engine.global_rank == 1:
    engine._group.barrier("alone")
elif "apart" in sys.argv:
    micro_step(engine, 3)
print("rank", engine.global_rank, "done")
"""


@pytest.mark.parametrize("how", ["together", "apart"])
def test_the_program_ends_by_itself(tmp_path: Path, how: str) -> None:
    """Neither the thread that tells where a rank is, nor a transfer that nobody waits for any more, keeps it alive."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(toys=str(job.TOYS)))
    command = [job.DEEPSPEED, "--num_gpus", "2", script, how]
    if not Path(job.DEEPSPEED).exists():
        pytest.skip("the deepspeed command is not installed beside this Python")
    finished = run_command(command, deadline=60, env={"OMP_NUM_THREADS": "1"})
    if how == "together":
        assert finished.check().stdout.count("done") == 2
    else:
        assert finished.code not in (0, None), finished
        assert "ranks disagree" in finished.stderr, finished
    assert finished.seconds < 40, sys.version
