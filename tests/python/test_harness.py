"""The test harness itself: values, exceptions, deaths and hangs of ranks come back as what they are."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from harness import RanksFailed, run_command, run_outcomes, run_ranks


def say_rank(prefix: str) -> tuple[str, int]:
    return prefix + os.environ["RANK"], int(os.environ["WORLD_SIZE"])


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("the reason")
    time.sleep(60)


def die_on_one(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "exit":
            sys.exit(7)
        os.kill(os.getpid(), signal.SIGKILL)


def sleep_somewhere() -> None:
    time.sleep(60)


def leave_a_child() -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid


def test_values_come_back_in_rank_order() -> None:
    assert run_ranks(say_rank, 3, "r") == [("r0", 3), ("r1", 3), ("r2", 3)]


def test_an_exception_stops_the_others_and_is_reported_first() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fail_on_one, 2, grace=1)
    report = str(failed.value)
    assert report.startswith("rank 1 raised")
    assert "KeyError: 'the reason'" in report
    assert [outcome.status for outcome in failed.value.outcomes] == ["stopped", "raised"]


def test_exit_codes_and_signals() -> None:
    assert [o.exit_code for o in run_outcomes(die_on_one, 2, "exit")] == [None, 7]
    assert [o.exit_code for o in run_outcomes(die_on_one, 2, "kill")] == [None, -signal.SIGKILL]


def test_a_hang_names_the_rank_and_the_line() -> None:
    hung = run_outcomes(sleep_somewhere, 1, deadline=5)[0]
    assert hung.status == "hung"
    assert "sleep_somewhere" in hung.stacks


def test_what_a_rank_started_ends_with_it() -> None:
    (pid,) = run_ranks(leave_a_child, 1)
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                break
        time.sleep(0.02)
    else:
        assert not os.path.exists(f"/proc/{pid}")


def test_a_command_past_its_deadline_is_ended() -> None:
    finished = run_command([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], deadline=1.0)
    assert finished.code is None
    assert finished.stdout == "up\n"
