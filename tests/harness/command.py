"""Runs a program to its end or to a deadline, leaving nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finished:
    """A program that ended: `code` is negative for a signal, None when it was ended at the deadline."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float

    def check(self) -> Finished:
        """Itself, or an AssertionError with its output when it did not exit with 0."""
        assert self.code == 0, f"exit code {self.code} after {self.seconds:.1f} s\n{self.stdout}\n{self.stderr}"
        return self


def run_command(
    command: Sequence[str | Path],
    *,
    deadline: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Finished:
    """Runs `command` in a session of its own; at `deadline` seconds the whole session is killed.

    env adds to this process's environment; an empty string unsets a variable.
    """
    environment = {**os.environ, **(env or {})}
    for name in [name for name, value in (env or {}).items() if value == ""]:
        del environment[name]
    began = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=deadline)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        _kill_session(process.pid)
        stdout, stderr = process.communicate()
        code = None
    finally:
        _kill_session(process.pid)
    return Finished(code, stdout, stderr, time.monotonic() - began)


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
