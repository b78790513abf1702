"""`--max_restarts` with a real training: it goes on from its last complete checkpoint, here and on several hosts. What is decided when is
tested in crates/cli/tests/restart.rs, without torch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from launched_job import DEEPSPEED, LIMIT, SCRIPTS, Job, assert_gone, limit, run, ssh_way
from servers import Servers, kill
from undisturbed import losses_of

TRAIN = SCRIPTS / "survivor.py"


@pytest.fixture(scope="session")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a run that nothing happens to prints."""
    found = losses_of(TRAIN, 2, tmp_path_factory.mktemp("undisturbed"), "never")
    assert len(found) == 6
    return found


def test_on_hosts(servers: Servers, tmp_path: Path, losses: list[str]) -> None:
    job = run(ssh_way(servers, slots=1), tmp_path, "--max_restarts=2", TRAIN, tmp_path / "saves", "once")
    assert job.process.returncode == 0, job.text
    assert "attempt 0 after 0 steps, because of None" in job.text
    assert "attempt 1 after 3 steps, because of rank-killed in step 4" in job.text
    assert "killed by signal 9 (SIGKILL) in step 4, after" in job.text
    assert "all ranks start again: restart 1 of 2" in job.text
    assert re.findall(r"step \d loss \S+", job.text) == losses


def test_here_and_the_same_step_twice(tmp_path: Path, losses: list[str]) -> None:
    done = subprocess.run(
        [DEEPSPEED, "--num_gpus", "2", "--max_restarts=5", TRAIN, tmp_path / "saves", "always"], cwd=tmp_path,
        capture_output=True, text=True, timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert "1 restart; no further one: it has failed twice in step 4" in done.stderr
    assert "attempt 1 after 3 steps" in done.stdout and "attempt 2 after" not in done.stdout
    assert re.findall(r"step \d loss \S+", done.stdout) == losses[:3]


def test_a_lost_host_comes_back(servers: Servers, tmp_path: Path) -> None:
    again = ("--no_python", "--no_local_rank", SCRIPTS / "again.sh", "deaf")
    with Job(ssh_way(servers), tmp_path, "--max_restarts=1", "--restart_on=host-lost", *again) as job:
        members = job.await_members()
        kill(members[2][1])
        assert job.wait(limit(2 * LIMIT)) == 0, job.text
        assert_gone([pid for pids in members.values() for pid in pids], within=limit())
    assert "host worker-2 was lost, after" in job.text and "all ranks start again in 1 s: restart 1 of 1" in job.text
    assert all(f"rank {rank} again: 1 host-lost\n" in job.text for rank in range(4)), job.text
