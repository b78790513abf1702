"""Jobs that go wrong, through the real launcher: the right cause, an exit code that is not 0, and nothing left."""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from harness import run_ranks
from job import SCRIPTS, Job, kill

VICTIM = SCRIPTS / "victim.py"


def read_back(folder: str) -> int:
    """Loads what `latest` names, all of it checked."""
    from toy import config, start

    engine = start(config(1))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    return engine.global_steps


@pytest.mark.parametrize(
    ("mode", "world", "victim"), [("forward", 2, 0), ("collective", 2, 1), ("save", 2, 1), ("save", 2, 0)]
)
def test_kill_9_at_any_moment(tmp_path: Path, mode: str, world: int, victim: int) -> None:
    with Job(tmp_path, "--num_gpus", str(world), VICTIM, "--mode", mode) as job:
        pids = job.await_ranks(world)
        moment = random.uniform(0.05, 0.6)
        time.sleep(moment)
        kill(pids[victim], signal.SIGKILL)
        began = time.monotonic()
        code = job.wait(20)
        took = time.monotonic() - began
        assert code == 128 + signal.SIGKILL, job.text
        assert took < 3, f"took {took:.1f} s"
        assert f"rank {victim} failed: killed by signal 9 (SIGKILL)" in job.report, job.text
        assert f"process {pids[victim]}" in job.report
        assert job.report.count(" failed: ") == 1
        job.assert_nothing_left()
    # Whatever was being written, a whole checkpoint is there, and `latest` names one.
    assert run_ranks(read_back, 1, str(tmp_path / "saves")) == [1]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with Job(tmp_path, "--num_gpus", "2", VICTIM) as job:
        job.await_ranks(2)
        time.sleep(0.2)
        job.process.send_signal(signal.SIGINT)
        assert job.wait(20) == 128 + signal.SIGINT, job.text
        job.assert_nothing_left()


def test_the_launcher_killed_takes_its_ranks_along(tmp_path: Path) -> None:
    with Job(tmp_path, "--num_gpus", "2", VICTIM, "--mode", "forward") as job:
        job.await_ranks(2)
        job.process.kill()
        job.wait(5)
        until = time.monotonic() + 5
        while job.processes() and time.monotonic() < until:
            time.sleep(0.05)
        job.assert_nothing_left()


def test_an_exception_on_one_rank(tmp_path: Path) -> None:
    with Job(tmp_path, "--num_gpus", "2", VICTIM, "--mode", "raise") as job:
        assert job.wait(60) == 1, job.text
        assert "rank 1 failed: exited with code 1" in job.report
        assert "KeyError: 'the reason of rank 1'" in job.report
        job.assert_nothing_left()


def test_a_rank_that_leaves_early(tmp_path: Path) -> None:
    with Job(tmp_path, "--num_gpus", "2", VICTIM, "--mode", "leave") as job:
        assert job.wait(60) == 1, job.text
        assert "rank 0 failed: exited with code 1" in job.report
        assert "finished:  rank 1, before this" in job.report
        assert "CommError: rank 1" in job.report and "left the group" in job.report
        job.assert_nothing_left()


def test_a_misspelt_config(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text('{\n  "train_batch_sizes": 8,\n  "fp16": {"enabeld": true}\n}\n')
    with Job(tmp_path, "--num_gpus", "2", VICTIM, "--config", "ds_config.json") as job:
        assert job.wait(60) == 1, job.text
        for part in (
            "ds_config.json:2:3",
            "train_batch_sizes",
            "train_batch_size`",
            "ds_config.json:3",
            "enabeld",
            "enabled`",
        ):
            assert part in job.report, (part, job.report)
        assert job.report.count("ds_config.json:2:3") <= 3, "said for every rank again"


def test_a_missing_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    with Job(tmp_path, "--num_gpus", "2", "trian.py") as job:
        assert job.wait(20) not in (0, None)
        assert "trian.py" in job.report and "train.py" in job.report, job.report
        assert "Traceback" not in job.report


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Job(tmp_path, "--num_gpus", "1", "--master_port", str(port), VICTIM) as job:
            assert job.wait(60) not in (0, None), job.text
            assert str(port) in job.report and "in use" in job.report, job.report
            assert "--master_port" in job.report
            job.assert_nothing_left()


def test_bad_options(tmp_path: Path) -> None:
    (tmp_path / "ok.py").write_text("")
    for options, parts in (
        (("--num_gpuz", "2"), ("--num_gpus",)),
        (("--num_gpus", "none"), ("none", "--num_gpus")),
        (("--include", "localhost:0", "--exclude", "localhost:1"), ("--include", "--exclude")),
        (("--include", "elsewhere:0"), ("elsewhere", "localhost")),
    ):
        with Job(tmp_path, *options, "ok.py") as job:
            assert job.wait(20) not in (0, None), options
            for part in parts:
                assert part in job.report, (options, job.report)
            assert "Traceback" not in job.report and "panicked" not in job.report


def test_a_config_judged_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2})
    )
    with Job(tmp_path, "config", "check", "c.json", "--world-size", "2", env={"PATH": "/nonexistent"}) as job:
        assert job.wait(20) not in (0, None)
        assert "train_batch_size" in job.text and "7" in job.text
