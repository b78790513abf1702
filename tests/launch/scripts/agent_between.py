"""Stands between the launcher and a host's agent, and rewrites what the agent says: a host that is other than the rest.

Usage: agent_between.py COMMAND EDIT, where EDIT is a Python file with `def edit(report)` that changes a report in place.
"""

from __future__ import annotations

import json
import runpy
import struct
import subprocess
import sys
from typing import BinaryIO

MESSAGE = 1


def read(source: BinaryIO, length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        sys.exit(0)
    return data


def main() -> None:
    command, file = sys.argv[1:]
    edit = runpy.run_path(file)["edit"]
    agent = subprocess.Popen([command, "__agent"], stdout=subprocess.PIPE)
    assert agent.stdout is not None
    out = sys.stdout.buffer
    out.write(agent.stdout.readline())
    while True:
        kind, length = struct.unpack("<BI", read(agent.stdout, 5))
        payload = read(agent.stdout, length)
        if kind == MESSAGE:
            report = json.loads(payload)
            edit(report)
            payload = json.dumps(report).encode()
        out.write(struct.pack("<BI", kind, len(payload)) + payload)
        out.flush()


main()
