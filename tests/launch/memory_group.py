"""A control group with a memory limit, for a rank that is to be killed by the kernel."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

LIMIT = 48 << 20
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_group() -> Iterator[Path | None]:
    """A new group whose processes may hold `LIMIT` bytes together; None where none can be made."""
    parent, limit = (_V1, "memory.limit_in_bytes") if _V1.is_dir() else (_V2, "memory.max")
    group = parent / f"deepspeed-tests-{uuid.uuid4()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        # What version 2 has not handed on to this group is not there.
        (group / limit).write_text(str(LIMIT))
    except OSError:
        group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        until = time.monotonic() + 30
        while True:
            try:
                group.rmdir()
                break
            except OSError:
                # A process of it is not collected yet.
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
