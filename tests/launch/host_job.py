"""Jobs on hosts: the real command against the real servers of `servers.py`, and what is left of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from servers import Servers, command_of

DEEPSPEED = Path(os.environ.get("DEEPSPEED_COMMAND") or Path(sys.executable).parent / "deepspeed")
SCRIPTS = Path(__file__).parent / "scripts"
# What a failure may take: the report is there, and nothing is left on any host.
LIMIT = 10
MEMBER = ("--no_python", "--no_local_rank", SCRIPTS / "member.sh")


class Job:
    """`deepspeed` on every host, in `folder`; a context manager that ends it.

    config  another ssh configuration than the servers' own.
    slots   of each host.
    """

    def __init__(
        self,
        servers: Servers,
        folder: Path,
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        config: Path | None = None,
        slots: int = 2,
    ):
        self.servers = servers
        self.out, self.err = folder / "job.out", folder / "job.err"
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(env or {})}
        line = [
            DEEPSPEED,
            "--hostfile",
            servers.hostfile(slots),
            "--launcher_args",
            f"-F '{config or servers.config}'",
            *arguments,
        ]
        # A test run that was started in the background ignores Ctrl-C, and the launcher would honour that.
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                ["env", "--default-signal=INT", *map(str, line)], cwd=folder, env=environment,
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


def run(
    servers: Servers,
    folder: Path,
    *arguments: str | Path,
    env: dict[str, str] | None = None,
    config: Path | None = None,
    slots: int = 2,
) -> Job:
    with Job(servers, folder, *arguments, env=env, config=config, slots=slots) as job:
        job.wait(120)
    return job


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def assert_gone(members: dict[int, list[int]], within: float = 0.0) -> None:
    pids = [pid for family in members.values() for pid in family]
    until = time.monotonic() + within
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left, f"{left} of {members} are left: {[command_of(pid) for pid in left]}"
