"""`deepspeed bench comm --backend gloo` between hosts. Shared memory is measured in crates/cli/tests/tools.rs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from launched_job import DEEPSPEED
from servers import Servers


def test_collectives_between_two_hosts(servers: Servers, tmp_path: Path) -> None:
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
