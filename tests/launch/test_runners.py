"""Jobs by ssh, pdsh, Open MPI, MPICH and Slurm, each the real program: the same training, and every flag does what it does on one host."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launched_job import DEEPSPEED, MEMBER, SCRIPTS, Job, Way, assert_gone, limit, run, way_by_ssh
from servers import Servers, command_of
from undisturbed import losses_of


@pytest.fixture(scope="session")
def losses() -> list[str]:
    """Those of four ranks of this machine."""
    found = losses_of(SCRIPTS / "train.py", 4)
    assert len(found) == 5
    return found


def test_training_by_a_runner_is_training_here(way: Way, losses: list[str], tmp_path: Path) -> None:
    job = run(way, tmp_path, SCRIPTS / "train.py")
    assert job.process.returncode == 0, job.text
    assert re.findall(r"step \d loss \S+", job.text) == losses
    assert "4 ranks on 2 hosts of 2" in job.text


def test_what_ranks_get_and_what_they_do_not(way: Way, tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("FROM_FILE=a 'b' $c %n\n\n")
    job = run(way, tmp_path, *MEMBER, "done", "it's $HOME %h", env={"NCCL_X": "; reboot"})
    assert job.process.returncode == 0, job.text
    for rank in range(4):
        prefix = f"[rank {rank}] " if rank else ""
        host, local = divmod(rank, 2)
        assert re.search(
            re.escape(f"{prefix}CROSS_RANK={host} CROSS_SIZE=2 FROM_FILE=a 'b' $c %n LOCAL_RANK={local} LOCAL_SIZE=2 ")
            + (r"MASTER_ADDR=127\.0\.0\.2 " if way.name == "ssh" else r"MASTER_ADDR=\S+ ")
            + re.escape(f"NCCL_X=; reboot RANK={rank} WORLD_SIZE=4 in {tmp_path} with it's $HOME %h\n"),
            job.text,
        ), job.text


def test_the_secrets_are_in_no_command_line(way: Way, tmp_path: Path) -> None:
    seen: set[str] = set()
    with Job(way, tmp_path, *MEMBER, "wait") as job:
        # From the first ssh client on, and of both ends: the hosts' processes are processes of this machine.
        while len(members := job.members()) < 4:
            seen |= {command_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
            assert job.process.poll() is None, job.text
            time.sleep(0.02)
        everyone = job.processes()
        seen |= {command_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
        variables = (Path("/proc") / str(members[3][0]) / "environ").read_bytes().decode().split("\0")
        (secret,) = (entry.partition("=")[2] for entry in variables if entry.startswith("DS_JOB_SECRET="))
        assert len(secret) == 64 and secret not in job.text
        assert any("__agent" in line for line in seen) and any("member.sh wait" in line for line in seen)
        assert not [line for line in seen if secret in line]
        # What says who the agent is would say the same of each of its ranks.
        assert not [entry for entry in variables if entry.startswith(("OMPI_", "PMI", "SLURM_PROCID", "SLURM_STEP"))]
        job.process.terminate()
        assert job.wait(limit()) == 128 + signal.SIGTERM, job.text
        assert_gone(everyone)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks of a host need a core each")
def test_flags_that_say_how_ranks_run(way: Way, tmp_path: Path) -> None:
    """--module, --bind_cores_to_rank, --venv_script, --save_pid, --no_local_rank, --enable_each_rank_log."""
    shutil.copy(SCRIPTS / "mymodule.py", tmp_path)
    (tmp_path / "activate").write_text(f"export FROM_VENV=yes\nPATH={DEEPSPEED.parent}:$PATH\n")
    flags = [
        "--bind_cores_to_rank",
        "--bind_core_list",
        "0-1",
        "--venv_script",
        str(tmp_path / "activate"),
        "--save_pid",
    ]
    flags += ["--no_local_rank", "--enable_each_rank_log", str(tmp_path / "logs"), "--module"]
    with Job(way, tmp_path, *flags, "mymodule", "--lr", "0 1", env={"TMPDIR": str(tmp_path)}) as job:
        until = time.monotonic() + 60
        while job.text.count(" of __main__ has ") < 4:
            assert job.process.poll() is None and time.monotonic() < until, job.text
            time.sleep(0.02)
        saved = tmp_path / f"{job.process.pid}.deepspeed"
        assert saved.read_text() == str(job.process.pid)
        (tmp_path / "go").touch()
        assert job.wait() == 0, job.text
        assert not saved.exists()
    for rank in range(4):
        said = f"rank {rank} of __main__ has {{'cores': [{rank % 2}], 'venv': 'yes', 'words': ['--lr', '0 1']}}\n"
        assert said in job.text, job.text
        (log,) = (tmp_path / "logs").glob(f"*_rank{rank}.log")
        assert log.read_text() == said


def test_a_slurm_job_is_its_own_hostfile(by_slurm: Way, tmp_path: Path) -> None:
    done = subprocess.run(
        ["salloc", "--nodes=2", "--ntasks-per-node=2", DEEPSPEED, "--launcher", "slurm", *MEMBER, "done", "x"],
        cwd=tmp_path, env={**os.environ, **by_slurm.environment, "DS_ACCELERATOR": "cpu"}, text=True,
        capture_output=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(4):
        assert f"RANK={rank} WORLD_SIZE=4 in {tmp_path} with x" in done.stdout, done.stdout


def test_hosts_that_cannot_be_reached_are_named(way: Way, servers: Servers, tmp_path: Path) -> None:
    if way.name == "slurm":
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("worker-1 slots=1\nworker-7 slots=1\n")
        unreachable, why = replace(way, hostfile=hostfile), "Slurm does not know a node of that name"
    else:
        refused = servers.config_where(tmp_path, lambda second: re.sub(r"Port \d+", "Port 1", second))
        unreachable, why = way_by_ssh(way.name, tmp_path, way.hostfile, refused), "nothing listens at ssh's port"
    job = run(unreachable, tmp_path, *MEMBER, "wait")
    assert job.process.returncode == 1, job.text
    assert "nothing was started" in job.text and why in job.text and "ready" not in job.text, job.text
    activate = tmp_path / "activate"
    activate.write_text("PATH=/nowhere\n")
    job = run(way, tmp_path, "--venv_script", activate, *MEMBER, "wait")
    assert job.process.returncode == 1, job.text
    for host in way.hosts:
        assert f"host {host}: deepspeed is not installed" in job.text, job.text
