"""What is particular to ssh: a connection of the launcher's own to each host. The rest is in test_runners.py and test_accidents.py."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from pathlib import Path

from launched_job import MEMBER, Job, assert_gone, limit, run, ssh_way
from servers import Servers, children, command_of, kill


def test_silent_hosts(servers: Servers, tmp_path: Path) -> None:
    """Nothing is closed and nothing comes: this end of the connection, or the other end is stopped."""
    silent = {}
    with contextlib.ExitStack() as jobs:
        for who in ("client", "server"):
            job = jobs.enter_context(Job(ssh_way(servers), tmp_path / who, *MEMBER, "deaf"))
            members = job.await_members()
            if who == "client":
                (victim,) = (pid for pid in children(job.process.pid) if "-- worker-2 " in command_of(pid))
            else:
                (victim,) = (pid for pid in servers.sessions() if members[2][1] in children(pid))
            kill(victim, signal.SIGSTOP)
            silent[who] = (job, job.processes(), victim, time.monotonic())
        for who, (job, processes, victim, began) in silent.items():
            assert job.wait(began + limit() - time.monotonic()) == 255, job.text
            assert "host worker-2 failed: it was lost" in job.text and "with it:   ranks 2-3" in job.text, who
            assert "it has said nothing for 6 s" in job.text and "ended:     ranks 0-1" in job.text, job.text
            if who == "server":
                kill(victim, signal.SIGCONT)  # the network is back, and the agent finds its launcher gone
            assert_gone(processes, within=limit())


def test_hosts_that_cannot_start_are_named(servers: Servers, tmp_path: Path) -> None:
    def text(config: Path | None = None, *arguments: str | Path) -> str:
        job = run(ssh_way(servers, config=config), tmp_path, *arguments, *MEMBER, "wait")
        assert job.process.returncode == 1 and "ready" not in job.text, job.text
        return job.text

    unknown = servers.config_where(
        tmp_path, lambda second: second.replace("HostKeyAlias worker-2", "HostKeyAlias stranger")
    )
    assert "host worker-2: its host key is not known here" in text(unknown)
    denied = servers.config_where(
        tmp_path, lambda second: re.sub(r"IdentityFile \S+", "IdentityFile /dev/null", second)
    )
    assert "host worker-2: it does not let us in without a password" in text(denied)
    stranger = tmp_path / "bin"
    stranger.mkdir()
    (stranger / "deepspeed").write_text("#!/bin/sh\nprintf '\\0deepspeed-agent 7\\n'\nexec sleep 60\n")
    (stranger / "deepspeed").chmod(0o755)
    activate = tmp_path / "activate"
    activate.write_text(f"PATH={stranger}:$PATH\n")
    assert "its deepspeed is of another version" in text(None, "--venv_script", activate)
