"""What became of one rank: values that cross between the server and the test."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One function to run on `world` ranks. `args` and `kwargs` are pickled by the test's process."""

    module: str
    function: str
    world: int
    arguments: bytes
    deadline_s: float
    grace_s: float
    environment: dict[str, str]
    sys_path: list[str]
    cwd: str


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    status      "returned", "raised" (an exception left the function), "died" (exit or signal), "hung"
                (still running at the deadline) or "stopped" (ended because another rank had failed).
    value       what the function returned (still pickled between the server and the test).
    error_type  the exception's class name, `error` its text, `traceback` the whole traceback.
    exit_code   of a rank that died; negative is a signal's number.
    stacks      every thread's Python stack of a rank that hung or was stopped.
    output      what it wrote to stdout and stderr.
    seconds     from the fork to the end.
    """

    rank: int
    status: str
    value: Any = None
    error_type: str = ""
    error: str = ""
    traceback: str = ""
    exit_code: int | None = None
    stacks: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == "returned"

    def describe(self) -> str:
        """One paragraph for a failing test's report."""
        head = f"rank {self.rank} {self.status} after {self.seconds:.1f} s"
        if self.status == "died" and self.exit_code is not None:
            head += f" with {_exit_in_words(self.exit_code)}"
        parts = [head]
        for title, text in (("", self.traceback), ("where it was:", self.stacks), ("its output:", self.output)):
            if text.strip():
                parts.append(f"{title}\n{_last_lines(text, 60)}".strip())
        return "\n".join(parts)


def _exit_in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"


def _last_lines(text: str, count: int) -> str:
    lines = text.rstrip().splitlines()
    return "\n".join(lines[-count:])
