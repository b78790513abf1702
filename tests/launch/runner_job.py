"""Jobs by pdsh, mpirun and srun: the real programs against the ssh servers of `servers.py` and the cluster of `slurm_cluster.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from servers import command_of

DEEPSPEED = Path(os.environ.get("DEEPSPEED_COMMAND") or Path(sys.executable).parent / "deepspeed")
SCRIPTS = Path(__file__).parent / "scripts"
MEMBER = ("--no_python", "--no_local_rank", SCRIPTS / "member.sh")
# What a failure may take: the report is there, and nothing is left on any host.
LIMIT = 10


@dataclass
class Way:
    """One runner with all that it needs to reach `worker-1` and `worker-2`.

    program  its own, which the launcher starts.
    daemon   what of the runner is the parent of an agent's front process, as its command line has it.
    """

    name: str
    hostfile: Path
    program: str
    daemon: str
    launcher_args: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def why_no_runner(name: str) -> str | None:
    """Why there cannot be this runner here; None where there can. Its servers have conditions of their own."""
    program, package = {
        "pdsh": ("pdsh", "pdsh"),
        "openmpi": ("mpirun.openmpi", "openmpi-bin"),
        "mpich": ("mpirun.mpich", "mpich"),
        "slurm": ("srun", "slurm-wlm"),
    }[name]
    return None if shutil.which(program) else f"{program} is not installed (apt-get install {package})"


def ssh_ways(folder: Path, hostfile: Path, config: Path) -> dict[str, Way]:
    """The runners that reach hosts by ssh."""
    wrapper = folder / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec ssh -F {config} "$@"\n')
    wrapper.chmod(0o755)
    return {
        "pdsh": Way("pdsh", hostfile, "pdsh", "sshd", "", {"PDSH_SSH_ARGS_APPEND": f"-F {config}"}),
        "openmpi": Way(
            "openmpi", hostfile, "mpirun.openmpi", "orted", f"--allow-run-as-root --mca plm_rsh_agent {wrapper}"
        ),
        "mpich": Way("mpich", hostfile, "mpirun.mpich", "hydra_pmi_proxy", f"-launcher-exec {wrapper}"),
    }


class RunnerJob:
    """`deepspeed` on both hosts with two slots each, in `folder`; a context manager that ends it."""

    def __init__(self, way: Way, folder: Path, *arguments: str | Path, env: dict[str, str] | None = None):
        self.way = way
        self.out, self.err = folder / "job.out", folder / "job.err"
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **way.environment, **(env or {})}
        line = [DEEPSPEED, "--hostfile", way.hostfile, "--launcher", way.name, f"--launcher_args={way.launcher_args}"]
        # A test run that was started in the background ignores Ctrl-C, and the launcher would honour that.
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                ["env", "--default-signal=INT", *map(str, [*line, *arguments])], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> RunnerJob:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def wait(self, deadline: float) -> int:
        try:
            return self.process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline} s:\n{self.text}") from None

    def await_members(self) -> dict[int, list[int]]:
        """rank -> the processes of the rank and of its agent, its child, and the one in a session of its own."""
        until = time.monotonic() + 60
        while len(members := self.members()) < 4:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < until, f"the ranks are not ready:\n{self.text}"
            time.sleep(0.02)
        return members

    def members(self) -> dict[int, list[int]]:
        """The same of those ranks that have said so."""
        pattern = r"rank (\d) ready, process (\d+), agent (\d+), child (\d+), apart (\d+)\n"
        found = re.findall(pattern, self.out.read_text(errors="replace"))
        return {int(rank): [int(pid) for pid in pids] for rank, *pids in found}


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])


def assert_all_gone(pids: list[int], within: float = 0.0) -> None:
    until = time.monotonic() + within
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left, f"{left} are left: {[command_of(pid) for pid in left]}"
