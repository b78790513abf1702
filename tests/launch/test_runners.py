"""Jobs by pdsh, Open MPI, MPICH and Slurm, each the real program: the same training, and nothing left when something dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runner_job import (
    DEEPSPEED,
    LIMIT,
    MEMBER,
    SCRIPTS,
    RunnerJob,
    Way,
    assert_all_gone,
    parent_of,
    ssh_ways,
    why_no_runner,
)
from servers import Servers, children, command_of, kill, why_not
from slurm_cluster import Cluster, why_no_slurm


@pytest.fixture(scope="module")
def by_ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Way]]:
    if why := why_not():
        pytest.skip(why)
    with Servers(tmp_path_factory.mktemp("servers"), 2) as servers:
        yield ssh_ways(servers.folder, servers.hostfile(2), servers.config)


@pytest.fixture(scope="module")
def by_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    if why := why_no_slurm():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as cluster:
        hostfile = cluster.folder / "hostfile"
        hostfile.write_text("worker-2 slots=2\nworker-1 slots=2\n")
        yield Way("slurm", hostfile, "srun", "slurmstepd", "", cluster.environment)


@pytest.fixture(params=["pdsh", "openmpi", "mpich", "slurm"])
def way(request: pytest.FixtureRequest) -> Way:
    if why := why_no_runner(request.param):
        pytest.skip(why)
    if request.param == "slurm":
        found = request.getfixturevalue("by_slurm")
    else:
        found = request.getfixturevalue("by_ssh")[request.param]
    assert isinstance(found, Way)
    return found


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of four ranks of this machine."""
    done = subprocess.run(
        [DEEPSPEED, "--num_gpus", "4", SCRIPTS / "train.py"], cwd=tmp_path_factory.mktemp("here"), text=True,
        capture_output=True, timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = re.findall(r"step \d loss \S+", done.stdout)
    assert len(found) == 5, done.stdout + done.stderr
    return found


def hosts_of(way: Way) -> list[str]:
    return [line.split()[0] for line in way.hostfile.read_text().splitlines()]


def family(members: dict[int, list[int]]) -> list[int]:
    """Every process of the job on the hosts: the ranks' and the agents', and the processes in front of the agents."""
    fronts = {parent_of(pids[1]) for pids in members.values()}
    return sorted({pid for pids in members.values() for pid in pids} | fronts)


def test_training_by_a_runner_is_training_here(way: Way, losses: list[str], tmp_path: Path) -> None:
    with RunnerJob(way, tmp_path, SCRIPTS / "train.py") as job:
        assert job.wait(120) == 0, job.text
    assert re.findall(r"step \d loss \S+", job.text) == losses
    assert "4 ranks on 2 hosts of 2" in job.text


def test_what_ranks_get_and_what_they_do_not(way: Way, tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("FROM_FILE=a 'b' $c %n\n\n")
    with RunnerJob(way, tmp_path, *MEMBER, "done", "it's $HOME %h", env={"NCCL_X": "; reboot"}) as job:
        assert job.wait(60) == 0, job.text
    for rank in range(4):
        prefix = f"[rank {rank}] " if rank else ""
        host, local = divmod(rank, 2)
        assert re.search(
            re.escape(f"{prefix}CROSS_RANK={host} CROSS_SIZE=2 FROM_FILE=a 'b' $c %n LOCAL_RANK={local} LOCAL_SIZE=2 ")
            + r"MASTER_ADDR=\S+ "
            + re.escape(f"NCCL_X=; reboot RANK={rank} WORLD_SIZE=4 in {tmp_path} with it's $HOME %h\n"),
            job.text,
        ), job.text


def test_the_secrets_are_in_no_command_line(way: Way, tmp_path: Path) -> None:
    with RunnerJob(way, tmp_path, *MEMBER, "wait") as job:
        members = job.await_members()
        everyone = family(members)
        variables = (Path("/proc") / str(members[3][0]) / "environ").read_bytes().decode().split("\0")
        (secret,) = (entry.partition("=")[2] for entry in variables if entry.startswith("DS_JOB_SECRET="))
        lines = [command_of(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        assert len(secret) == 64 and not [line for line in lines if secret in line]
        # What says who the agent is would say the same of each of its ranks.
        assert not [entry for entry in variables if entry.startswith(("OMPI_", "PMI", "SLURM_PROCID", "SLURM_STEP"))]
        job.process.terminate()
        assert job.wait(LIMIT) == 128 + signal.SIGTERM, job.text
        assert_all_gone(everyone)


@pytest.mark.parametrize("what", ["rank", "agent", "front", "daemon", "runner"])
def test_what_is_killed_ends_the_job(way: Way, tmp_path: Path, what: str) -> None:
    with RunnerJob(way, tmp_path, *MEMBER, "deaf") as job:
        members = job.await_members()
        everyone = family(members)
        second = hosts_of(way)[1]
        rank, agent = members[3][:2]
        front = parent_of(agent)
        (runner,) = (pid for pid in children(job.process.pid) if command_of(pid).startswith(way.program))
        daemon = parent_of(front)
        assert way.daemon in command_of(daemon)
        victims = {"rank": rank, "agent": agent, "front": front, "daemon": daemon, "runner": runner}
        kill(victims[what])
        code = job.wait(LIMIT)
        # A killed agent's host has nobody else to see to what has left its rank's group.
        assert_all_gone([*everyone, runner], within=3 if what in ("agent", "daemon", "front", "runner") else 0)
        report = job.err.read_text()
        assert report.count(" failed: ") == 1, report
        if what == "rank":
            assert code == 128 + signal.SIGKILL
            assert "rank 3 failed: killed by signal 9 (SIGKILL)" in report
            assert f"host {second}, process {rank}" in report and "ended:     ranks 0-2, by the launcher" in report
        elif what == "runner":
            assert code == 255
            assert f"{way.program.split('.')[0]} was killed by signal 9" in report and "with it:   ranks 0-3" in report
        else:
            assert code == 255
            assert f"host {second} failed: it was lost" in report and "with it:   ranks 2-3" in report, report


def test_a_stopped_rank_ends_the_job(way: Way, tmp_path: Path) -> None:
    with RunnerJob(way, tmp_path, *MEMBER, "wait") as job:
        members = job.await_members()
        everyone = family(members)
        kill(members[1][0], signal.SIGSTOP)
        assert job.wait(LIMIT) == 128 + signal.SIGSTOP, job.text
        assert_all_gone(everyone)
        assert "rank 1 failed: stopped by signal 19 (SIGSTOP)" in job.text


def test_ctrl_c_and_a_killed_launcher(way: Way, tmp_path: Path) -> None:
    with RunnerJob(way, tmp_path, *MEMBER, "deaf") as job:
        everyone = family(job.await_members())
        for _ in range(2):
            time.sleep(0.5)
            job.process.send_signal(signal.SIGINT)
        assert job.wait(LIMIT) == 128 + signal.SIGINT, job.text
        assert_all_gone(everyone)
    with RunnerJob(way, tmp_path, *MEMBER, "deaf") as job:
        everyone = family(job.await_members())
        job.process.kill()
        assert_all_gone(everyone, within=LIMIT)


def test_a_slurm_job_is_its_own_hostfile(by_slurm: Way, tmp_path: Path) -> None:
    done = subprocess.run(
        ["salloc", "--nodes=2", "--ntasks-per-node=2", DEEPSPEED, "--launcher", "slurm", *MEMBER, "done", "x"],
        cwd=tmp_path, env={**os.environ, **by_slurm.environment, "DS_ACCELERATOR": "cpu"}, text=True,
        capture_output=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(4):
        assert f"RANK={rank} WORLD_SIZE=4 in {tmp_path} with x" in done.stdout, done.stdout


def test_hosts_that_cannot_be_reached_are_named(way: Way, tmp_path: Path) -> None:
    if way.name == "slurm":
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("worker-1 slots=1\nworker-7 slots=1\n")
        unreachable, why = replace(way, hostfile=hostfile), "Slurm does not know a node of that name"
    else:
        config = way.hostfile.parent / "ssh_config"
        first, second = config.read_text().split("\n\n")
        refused = tmp_path / "ssh_config"
        refused.write_text(first + "\n\n" + re.sub(r"Port \d+", "Port 1", second))
        unreachable = ssh_ways(tmp_path, way.hostfile, refused)[way.name]
        why = "nothing listens at ssh's port"
    with RunnerJob(unreachable, tmp_path, *MEMBER, "wait") as job:
        assert job.wait(30) == 1, job.text
        assert "nothing was started" in job.text and why in job.text and "ready" not in job.text, job.text
    activate = tmp_path / "activate"
    activate.write_text("PATH=/nowhere\n")
    with RunnerJob(way, tmp_path, "--venv_script", activate, *MEMBER, "wait") as job:
        assert job.wait(30) == 1, job.text
        for host in hosts_of(way):
            assert f"host {host}: deepspeed is not installed where it is here" in job.text, job.text
