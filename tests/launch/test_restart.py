"""`--max_restarts` with a real training: it goes on from its last complete checkpoint, here and on several hosts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_job import DEEPSPEED, LIMIT, SCRIPTS, Job, assert_gone, run
from servers import Servers, kill, why_not

TRAIN = SCRIPTS / "survivor.py"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    if why := why_not():
        pytest.skip(why)
    with Servers(tmp_path_factory.mktemp("servers"), 2) as started:
        yield started


def here(folder: Path, *options: str, when: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEEPSPEED, "--num_gpus", "2", *options, TRAIN, folder / "saves", when], cwd=folder, capture_output=True, text=True,
        timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a run that nothing happens to prints."""
    done = here(tmp_path_factory.mktemp("undisturbed"), when="never")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"step \d loss \S+", done.stdout)
    assert len(found) == 6, done.stdout
    return found


def check_resumed(code: int, text: str, losses: list[str]) -> None:
    assert code == 0, text
    assert "attempt 0 after 0 steps, because of None" in text
    assert "attempt 1 after 3 steps, because of rank-killed in step 4" in text
    assert "killed by signal 9 (SIGKILL) in step 4, after" in text and "all ranks start again: restart 1 of 2" in text
    assert re.findall(r"step \d loss \S+", text) == losses


def test_here(tmp_path: Path, losses: list[str]) -> None:
    done = here(tmp_path, "--max_restarts=2", when="once")
    check_resumed(done.returncode, done.stdout + done.stderr, losses)


def test_on_hosts(servers: Servers, tmp_path: Path, losses: list[str]) -> None:
    job = run(servers, tmp_path, "--max_restarts=2", TRAIN, tmp_path / "saves", "once", slots=1)
    check_resumed(job.process.returncode, job.text, losses)


def test_the_same_step_twice(tmp_path: Path) -> None:
    done = here(tmp_path, "--max_restarts=5", when="always")
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert "1 restart; no further one: it has failed twice in step 4" in done.stderr
    assert "attempt 1 after 3 steps" in done.stdout and "attempt 2 after" not in done.stdout


def test_a_lost_host_comes_back(servers: Servers, tmp_path: Path) -> None:
    again = ("--no_python", "--no_local_rank", SCRIPTS / "again.sh", "deaf")
    with Job(servers, tmp_path, "--max_restarts=1", "--restart_on=host-lost", *again) as job:
        members = job.await_members()
        kill(members[2][1])
        assert job.wait(2 * LIMIT) == 0, job.text
        assert_gone(members, within=3)
    assert "host worker-2 was lost, after" in job.text and "all ranks start again in 1 s: restart 1 of 1" in job.text
    assert all(f"rank {rank} again: 1 host-lost\n" in job.text for rank in range(4)), job.text
