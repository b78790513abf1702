"""Jobs on hosts: the real command and the real runners against the ssh servers of `servers.py` and the cluster of `slurm_cluster.py`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from servers import Servers, command_of

DEEPSPEED = Path(os.environ.get("DEEPSPEED_COMMAND") or Path(sys.executable).parent / "deepspeed")
SCRIPTS = Path(__file__).parent / "scripts"
MEMBER = ("--no_python", "--no_local_rank", SCRIPTS / "member.sh")
RUNNERS = ("ssh", "pdsh", "openmpi", "mpich", "slurm")
# Those that start a process in front of each agent.
_IN_FRONT = ("pdsh", "mpirun.openmpi", "mpirun.mpich", "srun")
# What a failure may take: the report is there, and nothing is left on any host.
LIMIT = 10


@dataclass
class Way:
    """One runner with all that it needs to reach the hosts of a hostfile.

    name     that of `--launcher`, or `here`: this machine alone.
    program  its own, which the launcher starts.
    daemon   what is the parent of an agent on its host, or of the process in front of it, as its command line has it.
    """

    name: str
    hostfile: Path
    program: str
    daemon: str
    launcher_args: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def hosts(self) -> list[str]:
        """As reports name them."""
        if self.name == "here":
            return [platform.node()] * 2
        return [line.split()[0] for line in self.hostfile.read_text().splitlines()]


def why_no_runner(name: str) -> str | None:
    """Why there cannot be this runner here; None where there can. Its servers have conditions of their own."""
    program, package = {
        "ssh": ("ssh", "openssh-client"),
        "pdsh": ("pdsh", "pdsh"),
        "openmpi": ("mpirun.openmpi", "openmpi-bin"),
        "mpich": ("mpirun.mpich", "mpich"),
        "slurm": ("srun", "slurm-wlm"),
    }[name]
    return None if shutil.which(program) else f"{program} is not installed (apt-get install {package})"


def ssh_way(servers: Servers, slots: int = 2, config: Path | None = None) -> Way:
    """The first two servers by ssh; config: another configuration than their own."""
    return Way("ssh", servers.hostfile(slots), "ssh", "sshd", f"-F '{config or servers.config}'")


def way_by_ssh(name: str, folder: Path, hostfile: Path, config: Path) -> Way:
    """A runner that reaches hosts by ssh, with this configuration; folder: for what it takes."""
    if name == "ssh":
        return Way("ssh", hostfile, "ssh", "sshd", f"-F '{config}'")
    if name == "pdsh":
        return Way("pdsh", hostfile, "pdsh", "sshd", "", {"PDSH_SSH_ARGS_APPEND": f"-F {config}"})
    wrapper = folder / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec ssh -F {config} "$@"\n')
    wrapper.chmod(0o755)
    if name == "openmpi":
        args = f"--allow-run-as-root --mca plm_rsh_agent {wrapper}"
        return Way("openmpi", hostfile, "mpirun.openmpi", "orted", args)
    return Way("mpich", hostfile, "mpirun.mpich", "hydra_pmi_proxy", f"-launcher-exec {wrapper}")


class Job:
    """`deepspeed` on every host of `way`, in `folder`; a context manager that ends it."""

    def __init__(self, way: Way, folder: Path, *arguments: str | Path, env: dict[str, str] | None = None):
        self.way = way
        folder.mkdir(exist_ok=True)
        self.out, self.err = folder / "job.out", folder / "job.err"
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **way.environment, **(env or {})}
        line = [DEEPSPEED, "--hostfile", way.hostfile]
        if way.name != "here":
            line += ["--launcher", way.name, f"--launcher_args={way.launcher_args}"]
        # A test run that was started in the background ignores Ctrl-C, and the launcher would honour that.
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                ["env", "--default-signal=INT", *map(str, [*line, *arguments])], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def wait(self, deadline: float = 120) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline} s:\n{self.text}") from None

    def await_members(self) -> dict[int, list[int]]:
        """rank -> the processes of the rank and of its agent, its child, and the one in a session of its own."""
        until = time.monotonic() + 120
        while len(members := self.members()) < 4:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < until, f"the ranks are not ready:\n{self.text}"
            time.sleep(0.05)
        return members

    def members(self) -> dict[int, list[int]]:
        """The same of those ranks that have said so."""
        pattern = r"rank (\d) ready, process (\d+), agent (\d+), child (\d+), apart (\d+)\n"
        found = re.findall(pattern, self.out.read_text(errors="replace"))
        return {int(rank): [int(pid) for pid in pids] for rank, *pids in found}

    def processes(self) -> list[int]:
        """Every process of the job on the hosts: the ranks' and the agents', and those in front of the agents."""
        members = self.members()
        fronts = {parent_of(pids[1]) for pids in members.values()} if self.way.program in _IN_FRONT else set()
        return sorted({pid for pids in members.values() for pid in pids} | fronts)


def run(way: Way, folder: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> Job:
    """A job that has ended."""
    with Job(way, folder, *arguments, env=env) as job:
        job.wait()
    return job


def limit(seconds: float = LIMIT) -> float:
    """So many seconds of a machine that has nothing else to do: longer where others want its processors, too."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])


def assert_gone(pids: list[int], within: float = 0.0) -> None:
    until = time.monotonic() + within
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left, f"{left} are left: {[command_of(pid) for pid in left]}"
