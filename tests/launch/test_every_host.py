"""`deepspeed ssh` on real ssh servers."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

from launched_job import DEEPSPEED
from servers import Servers, command_of, kill


def line(servers: Servers, *command: str, config: Path | None = None) -> list[str]:
    flags = ["-f", servers.hostfile(1), "--launcher_args", f"-F '{config or servers.config}'"]
    return [str(word) for word in [DEEPSPEED, "ssh", *flags, *command]]


def run(servers: Servers, *command: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(servers, *command, config=config), capture_output=True, text=True, timeout=60)


def test_one_word_is_a_command_line(servers: Servers) -> None:
    done = run(servers, 'set -- $SSH_CONNECTION; echo "$3" | tr . ,; echo oops >&2')
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["worker-1: 127,0,0,2", "worker-2: 127,0,0,3"]
    assert sorted(done.stderr.splitlines()) == ["worker-1: oops", "worker-2: oops"]


def test_several_words_arrive_as_they_are(servers: Servers) -> None:
    words = ["a b", "$HOME", "it's", 'x"y', "`id`", "*", "", "-n", "; exit 9"]
    done = run(servers, "printf", "<%s>\\n", *words)
    assert done.returncode == 0, done.stderr
    for host in servers.names[:2]:
        seen = re.findall(rf"^{host}: <(.*)>$", done.stdout, re.M)
        assert seen == words, done.stdout


def test_the_greatest_exit_code(servers: Servers) -> None:
    done = run(servers, "set -- $SSH_CONNECTION; exit ${3##*.}")
    assert done.returncode == 3
    assert "worker-1: exited with code 2\n" in done.stderr and "worker-2: exited with code 3\n" in done.stderr


def test_a_host_that_cannot_be_reached(servers: Servers, tmp_path: Path) -> None:
    config = servers.config_where(tmp_path, lambda second: re.sub(r"Port \d+", "Port 1", second))
    done = run(servers, "echo there", config=config)
    assert done.returncode == 255 and done.stdout == "worker-1: there\n"
    assert "worker-2: not reached: nothing listens at ssh's port" in done.stderr


def test_nothing_stays_when_it_is_killed(servers: Servers) -> None:
    process = subprocess.Popen(line(servers, "echo $$; sleep 300"), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pids = [int(process.stdout.readline().split()[1]) for _ in servers.names[:2]]
        assert all("sleep 300" in command_of(pid) for pid in pids)
        process.kill()
        process.wait()
        until = time.monotonic() + 10
        while any(command_of(pid) for pid in pids):
            assert time.monotonic() < until, [command_of(pid) for pid in pids]
            time.sleep(0.05)
    finally:
        kill(process.pid)


def test_this_machine_alone(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=1\n")
    command = [DEEPSPEED, "ssh", "-f", hostfile, "echo here; exit 4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (4, "localhost: here\n")
