"""`deepspeed bench comm --backend gloo` between hosts. Shared memory is measured in crates/cli/tests/tools.rs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from servers import Servers, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

DEEPSPEED = Path(os.environ.get("DEEPSPEED_COMMAND") or Path(sys.executable).parent / "deepspeed")


def test_collectives_between_two_hosts(tmp_path: Path) -> None:
    with Servers(tmp_path, 2) as servers:
        line = [DEEPSPEED, "bench", "comm", "--backend", "gloo", "--json", "--hostfile", servers.hostfile(1)]
        line += ["--launcher_args", f"-F '{servers.config}'", "--dtype", "bf16", "--max", "4KiB", "--trials", "1"]
        done = subprocess.run(list(map(str, line)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert (seen["run"]["world"], seen["run"]["hosts"]) == (2, 2)
    rows = {row["op"]: row for row in seen["results"]}
    assert len(rows) == 5
    for row in rows.values():
        assert row["skipped"] is None and row["wrong"] == 0 and row["seconds"] > 0, row
