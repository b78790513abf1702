"""Jobs on several hosts, through real ssh servers: what the ranks get, the same training, and nothing left when something dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_job import DEEPSPEED, LIMIT, MEMBER, SCRIPTS, Job, assert_gone, run
from servers import Servers, children, command_of, kill, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("servers"), 2) as started:
        yield started


def test_what_ranks_get(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("FROM_FILE=a 'b' $c\n\n")
    job = run(servers, tmp_path, *MEMBER, "done", "it's $HOME", env={"NCCL_X": "; reboot"})
    assert job.process.returncode == 0, job.text
    for rank in range(4):
        prefix = f"[rank {rank}] " if rank else ""
        host, local = divmod(rank, 2)
        assert (
            f"{prefix}CROSS_RANK={host} CROSS_SIZE=2 FROM_FILE=a 'b' $c LOCAL_RANK={local} LOCAL_SIZE=2 "
            f"MASTER_ADDR=127.0.0.2 NCCL_X=; reboot RANK={rank} WORLD_SIZE=4 in {tmp_path} with it's $HOME\n"
        ) in job.text, job.text


def test_the_secret_is_in_no_command_line(servers: Servers, tmp_path: Path) -> None:
    seen: set[str] = set()
    with Job(servers, tmp_path, *MEMBER, "wait") as job:
        # From the first ssh client on, and of both ends: the hosts' processes are processes of this machine.
        while len(members := job.members()) < 4:
            seen |= {command_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
            assert job.process.poll() is None, job.text
        environment = (Path("/proc") / str(members[3][0]) / "environ").read_bytes().split(b"\0")
        (secret,) = (entry.split(b"=")[1] for entry in environment if entry.startswith(b"DS_JOB_SECRET="))
        assert len(secret) == 64
        seen |= {command_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
        assert any("__agent" in line for line in seen) and any("member.sh wait" in line for line in seen)
        assert not [line for line in seen if secret.decode() in line]
        assert secret.decode() not in job.text
        job.process.terminate()
        assert job.wait(LIMIT) == 128 + signal.SIGTERM, job.text
        assert_gone(members)


def test_training_on_two_hosts_is_training_on_one(servers: Servers, tmp_path: Path) -> None:
    hosts = run(servers, tmp_path, SCRIPTS / "train.py")
    assert hosts.process.returncode == 0, hosts.text
    here = subprocess.run(
        [DEEPSPEED, "--num_gpus", "4", SCRIPTS / "train.py"], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    losses = re.findall(r"step \d loss \S+", here.stdout)
    assert len(losses) == 5, here.stdout + here.stderr
    assert re.findall(r"step \d loss \S+", hosts.text) == losses
    assert "4 ranks on 2 hosts of 2" in hosts.text and "4 ranks on 1 hosts of 4" in here.stdout


@pytest.mark.parametrize("mode", ["wait", "deaf"])
def test_a_killed_rank(servers: Servers, tmp_path: Path, mode: str) -> None:
    with Job(servers, tmp_path, *MEMBER, mode) as job:
        members = job.await_members()
        kill(members[3][0])
        assert job.wait(LIMIT) == 128 + signal.SIGKILL, job.text
        assert_gone(members)
        assert "rank 3 failed: killed by signal 9 (SIGKILL)" in job.text
        assert f"host worker-2, process {members[3][0]}" in job.text
        assert "ended:     ranks 0-2, by the launcher" in job.text
        assert job.text.count(" failed: ") == 1


def test_a_rank_that_fails(servers: Servers, tmp_path: Path) -> None:
    job = run(servers, tmp_path, *MEMBER, "fail")
    assert job.process.returncode == 7, job.text
    assert "rank 2 failed: exited with code 7" in job.text and "  | the reason of rank 2" in job.text
    assert_gone(job.members())


def test_a_stopped_rank(servers: Servers, tmp_path: Path) -> None:
    with Job(servers, tmp_path, *MEMBER, "wait") as job:
        members = job.await_members()
        kill(members[1][0], signal.SIGSTOP)
        assert job.wait(LIMIT) == 128 + signal.SIGSTOP, job.text
        assert_gone(members)
        assert "rank 1 failed: stopped by signal 19 (SIGSTOP)" in job.text


def test_a_killed_agent(servers: Servers, tmp_path: Path) -> None:
    with Job(servers, tmp_path, *MEMBER, "deaf") as job:
        members = job.await_members()
        kill(members[2][1])
        assert job.wait(LIMIT) not in (0, None), job.text
        # The guard sees to its host, also to what has left its rank's group.
        assert_gone(members, within=3)
        assert "host worker-2 failed: it was lost" in job.text and "with it:   ranks 2-3" in job.text
        assert "ended:     ranks 0-1, by the launcher" in job.text


def test_silent_hosts(servers: Servers, tmp_path: Path) -> None:
    """Nothing is closed and nothing comes: the agent, this end of the connection, or the other end is stopped."""
    silent = {}
    with contextlib.ExitStack() as jobs:
        for who in ("agent", "client", "server"):
            (tmp_path / who).mkdir()
            job = jobs.enter_context(Job(servers, tmp_path / who, *MEMBER, "deaf"))
            members = job.await_members()
            if who == "agent":
                victim = members[2][1]
            elif who == "client":
                (victim,) = (pid for pid in children(job.process.pid) if "-- worker-2 " in command_of(pid))
            else:
                (victim,) = (pid for pid in servers.sessions() if members[2][1] in children(pid))
            kill(victim, signal.SIGSTOP)
            silent[who] = (job, members, victim, time.monotonic())
        for who, (job, members, victim, began) in silent.items():
            assert job.wait(began + LIMIT - time.monotonic()) == 255, job.text
            assert "host worker-2 failed: it was lost" in job.text and "with it:   ranks 2-3" in job.text, who
            assert "it has said nothing for 6 s" in job.text and "ended:     ranks 0-1" in job.text, job.text
            if who == "server":
                kill(victim, signal.SIGCONT)  # the network is back, and the agent finds its launcher gone
            assert_gone(members, within=6)


def test_a_rank_at_its_memory_limit(servers: Servers, tmp_path: Path) -> None:
    done = run(servers, tmp_path, SCRIPTS / "greedy.py", slots=1)
    here = subprocess.run(
        [DEEPSPEED, "--num_gpus", "2", SCRIPTS / "greedy.py"], cwd=tmp_path, capture_output=True, text=True,
        timeout=60, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    for code, text in ((done.process.returncode, done.text), (here.returncode, here.stderr)):
        assert code == 1, text
        assert "rank 1 failed: exited with code 1" in text
        assert (
            "evidence:  out of memory: it was refused memory and said `MemoryError`; its limit is 2.0 GiB (ulimit -v)"
            in text
        )
        assert "ended:     rank 0, by the launcher" in text


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_lost_connection(servers: Servers, tmp_path: Path, end: str) -> None:
    with Job(servers, tmp_path, *MEMBER, "deaf") as job:
        members = job.await_members()
        if end == "client":
            (victim,) = (pid for pid in children(job.process.pid) if "-- worker-1 " in command_of(pid))
        else:
            (victim,) = (pid for pid in servers.sessions() if members[0][1] in children(pid))
        kill(victim)
        assert job.wait(LIMIT) not in (0, None), job.text
        assert_gone(members, within=5)
        assert "host worker-1 failed: it was lost" in job.text and "with it:   ranks 0-1" in job.text


def test_a_killed_launcher(servers: Servers, tmp_path: Path) -> None:
    with Job(servers, tmp_path, *MEMBER, "deaf") as job:
        members = job.await_members()
        job.process.kill()
        assert_gone(members, within=LIMIT)


@pytest.mark.parametrize(("mode", "presses"), [("wait", 1), ("deaf", 2)])
def test_ctrl_c(servers: Servers, tmp_path: Path, mode: str, presses: int) -> None:
    with Job(servers, tmp_path, *MEMBER, mode) as job:
        members = job.await_members()
        for _ in range(presses):
            time.sleep(0.5)
            job.process.send_signal(signal.SIGINT)
        assert job.wait(LIMIT) == 128 + signal.SIGINT, job.text
        assert_gone(members)


def test_hosts_that_cannot_start_are_named(servers: Servers, tmp_path: Path) -> None:
    def text(config: Path | None = None, *arguments: str | Path) -> str:
        job = run(servers, tmp_path, *arguments, *MEMBER, "wait", config=config)
        assert job.process.returncode == 1 and "ready" not in job.text, job.text
        return job.text

    original = servers.config.read_text()
    config = tmp_path / "ssh_config"
    first, second = original.split("\n\n")
    config.write_text(first + "\n\n" + second.replace("HostKeyAlias worker-2", "HostKeyAlias stranger"))
    assert "host worker-2: its host key is not known here" in text(config)
    config.write_text(first + "\n\n" + re.sub(r"Port \d+", "Port 1", second))
    assert "host worker-2: nothing listens at ssh's port" in text(config)
    config.write_text(first + "\n\n" + re.sub(r"IdentityFile \S+", "IdentityFile /dev/null", second))
    assert "host worker-2: it does not let us in without a password" in text(config)
    activate = tmp_path / "activate"
    activate.write_text("PATH=/nowhere\n")
    both = text(None, "--venv_script", activate)
    assert "host worker-1: deepspeed is not installed" in both and "host worker-2: deepspeed is not installed" in both
    stranger = tmp_path / "bin"
    stranger.mkdir()
    (stranger / "deepspeed").write_text("#!/bin/sh\nprintf '\\0deepspeed-agent 7\\n'\nexec sleep 60\n")
    (stranger / "deepspeed").chmod(0o755)
    activate.write_text(f"PATH={stranger}:$PATH\n")
    assert "its deepspeed is of another version" in text(None, "--venv_script", activate)
