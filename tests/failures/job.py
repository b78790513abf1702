"""A launched job that a test watches while it runs: what it prints, its processes, what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

DEEPSPEED = Path(sys.executable).parent / "deepspeed"
SCRIPTS = Path(__file__).parent / "scripts"
TOYS = Path(__file__).parents[1] / "engine"
# What the harness's ranks import comes from here, too.
sys.path.insert(0, str(TOYS))


class Job:
    """`deepspeed` with `arguments`, in `folder`, in a session of its own; a context manager that ends all of it."""

    def __init__(self, folder: Path, *arguments: str | Path, env: dict[str, str] | None = None):
        self.mark = f"E2E_JOB={uuid.uuid4()}"
        self.out, self.err = folder / "job.out", folder / "job.err"
        self._shared_before = shared_memory()
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "E2E_JOB": self.mark.partition("=")[2]}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TOYS), os.environ.get("PYTHONPATH")]))
        environment |= env or {}
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [str(DEEPSPEED), *map(str, arguments)], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.processes():
            kill(pid, signal.SIGKILL)

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    @property
    def report(self) -> str:
        """What the launcher itself said."""
        return self.err.read_text(errors="replace")

    def await_lines(self, pattern: str, count: int, deadline: float = 60.0) -> list[tuple[str, ...]]:
        """The groups of the first `count` matches in the ranks' output."""
        until = time.monotonic() + deadline
        while True:
            found = re.findall(pattern, self.out.read_text(errors="replace"))
            if len(found) >= count:
                return found[:count]
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < until, f"no {pattern} within {deadline} s:\n{self.text}"
            time.sleep(0.02)

    def await_ranks(self, count: int) -> dict[int, int]:
        """rank -> process id, once every rank says that it is ready."""
        return {int(rank): int(pid) for rank, pid in self.await_lines(r"rank (\d+) ready, process (\d+)", count)}

    def wait(self, deadline: float) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline} s:\n{self.text}") from None

    def processes(self) -> list[int]:
        """All processes of this job that still run, whatever their session: they carry its mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    marked = self.mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                except OSError:
                    continue
                if marked and state != "Z":
                    found.append(int(entry.name))
        return found

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        until = time.monotonic() + 3
        # Other programs of this machine use shared memory, too: what is theirs goes away, or was there before.
        while (left := shared_memory() - self._shared_before) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, f"left in /dev/shm: {left}"


def shared_memory() -> set[str]:
    """Names in /dev/shm, but for those of torch's data loaders and of other programs that may run beside the tests."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("torch_", "deepspeed_allreduce_buffer"))}


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
