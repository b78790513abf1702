"""`deepspeed doctor` on real ssh servers: hosts that are well, and a broken one of each kind."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launched_job import DEEPSPEED
from servers import Servers

BETWEEN = Path(__file__).parent / "scripts" / "agent_between.py"


class Doctor:
    """A run of `deepspeed doctor --json`."""

    def __init__(
        self, servers: Servers, folder: Path, *arguments: str | Path, config: Path | None = None, slots: str = ""
    ):
        hostfile = folder / "hosts"
        hostfile.write_text(slots or servers.hostfile(2).read_text())
        line = [DEEPSPEED, "doctor", "--json", "--hostfile", hostfile, *arguments]
        line += ["--launcher_args", f"-F '{config or servers.config}'"]
        self.done = subprocess.run(list(map(str, line)), cwd=folder, capture_output=True, text=True, timeout=90)
        self.code, self.text = self.done.returncode, self.done.stdout + self.done.stderr
        self.seen: dict[str, Any] = json.loads(self.done.stdout) if self.code in (0, 1) else {}

    def findings(self, level: str = "failure") -> dict[tuple[str, str], str]:
        """(check, host) -> what is wrong."""
        return {(one["check"], one["host"]): one["text"] for one in self.seen["findings"] if one["level"] == level}


def disguise(folder: Path, body: str) -> Path:
    """A script for --venv_script under which `deepspeed` on worker-2 is `body`, a line of shell with the real one as $REAL."""
    bin = folder / "bin"
    bin.mkdir()
    command = bin / "deepspeed"
    command.write_text(
        f'#!/bin/sh\nREAL={shlex.quote(str(DEEPSPEED))}\ncase $SSH_CONNECTION in *" 127.0.0.3 "*) {body} ;; esac\n'
        'exec "$REAL" __agent\n'
    )
    command.chmod(0o755)
    activate = folder / "activate"
    activate.write_text(f"PATH={shlex.quote(str(bin))}:$PATH\n")
    return activate


def other(folder: Path, edit: str) -> Path:
    """The same, where worker-2's agent says something else than what is true: `edit` changes `answer`, the facts, in place."""
    file = folder / "edit.py"
    file.write_text(f"def edit(report):\n{edit}")
    return disguise(folder, f'exec {shlex.quote(sys.executable)} {BETWEEN} "$REAL" {shlex.quote(str(file))}')


def test_hosts_that_are_well(servers: Servers, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    doctor = Doctor(servers, tmp_path, "--shared-folder", shared)
    assert doctor.code == 0 and not doctor.findings(), doctor.text
    seen = doctor.seen["examination"]
    assert [host["host"] for host in seen["hosts"]] == ["worker-1", "worker-2"]
    for at, host in enumerate(seen["hosts"]):
        assert host["problem"] is None and host["facts"]["python"]["torch"]["version"]
        assert abs(host["clock"]["ahead"]) <= host["clock"]["uncertainty"] + 0.1
        assert seen["connections"][at][at] is None and seen["connections"][at][1 - at]["Ok"] >= 0
    assert seen["shared_folder"]["read_problems"] == [[None, None], [None, None]]
    assert seen["meeting"]["address"] == "127.0.0.2" and seen["meeting"]["port"]["Ok"] > 0
    assert list(shared.iterdir()) == [], "the examination leaves nothing behind"


def test_the_table(servers: Servers, tmp_path: Path) -> None:
    line = [DEEPSPEED, "doctor", "-f", servers.hostfile(2), "--launcher_args", f"-F '{servers.config}'"]
    done = subprocess.run(list(map(str, line)), cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"worker-2 +\d+ ms +[+-]0\.\d+ s +\d+\.\d+\.\d+ ", done.stdout), done.stdout
    assert re.search(r"from . to +worker-1 +worker-2\n +worker-1 +- +[\d.]+ ms\n", done.stdout), done.stdout
    assert "rank 0 would await the others on worker-1 at 127.0.0.2" in done.stdout


def test_hosts_that_ssh_does_not_reach(servers: Servers, tmp_path: Path) -> None:
    first, second, _ = servers.config.read_text().split("\n\n")
    renamed = {name: second.replace("Host worker-2", f"Host {name}", 1) for name in ("stranger", "closed", "denied")}
    config = tmp_path / "ssh_config"
    config.write_text(
        "\n\n".join(
            [
                first,
                renamed["stranger"].replace("HostKeyAlias worker-2", "HostKeyAlias stranger"),
                re.sub(r"Port \d+", "Port 1", renamed["closed"]),
                re.sub(r"IdentityFile \S+", "IdentityFile /dev/null", renamed["denied"]),
                "Host nowhere\n  HostName nowhere.invalid\n",
            ]
        )
    )
    names = ["worker-1", "stranger", "closed", "denied", "nowhere"]
    doctor = Doctor(servers, tmp_path, config=config, slots="".join(f"{name} slots=1\n" for name in names))
    assert doctor.code == 1
    assert {host: text.split(";")[0].split(" (")[0] for (_, host), text in doctor.findings().items()} == {
        "stranger": "its host key is not known here",
        "closed": "nothing listens at ssh's port",
        "denied": "it does not let us in without a password",
        "nowhere": "its name is not known",
    }, doctor.text
    # What can be known is known nevertheless.
    hosts = doctor.seen["examination"]["hosts"]
    assert hosts[0]["facts"]["cpu"]["cores"] > 0 and hosts[1]["facts"] is None


def test_a_host_without_deepspeed(servers: Servers, tmp_path: Path) -> None:
    activate = tmp_path / "activate"
    activate.write_text(f'PATH={DEEPSPEED.parent}\ncase $SSH_CONNECTION in *" 127.0.0.3 "*) PATH=/nowhere ;; esac\n')
    doctor = Doctor(servers, tmp_path, "--venv_script", activate)
    assert doctor.code == 1 and list(doctor.findings()) == [("reach", "worker-2")], doctor.text
    assert "deepspeed is not installed" in doctor.findings()["reach", "worker-2"]


def test_a_host_with_another_deepspeed(servers: Servers, tmp_path: Path) -> None:
    activate = other(tmp_path, "    if 'Hello' in report: report['Hello']['version'] = '0.1.2'\n")
    doctor = Doctor(servers, tmp_path, "--venv_script", activate)
    assert doctor.code == 1
    assert "has version 0.1.2" in doctor.findings()["reach", "worker-2"], doctor.text


def test_a_host_that_differs(servers: Servers, tmp_path: Path) -> None:
    activate = other(
        tmp_path,
        """    answer = report.get("Answer", {}) if isinstance(report, dict) else {}
    if "Clock" in answer:
        answer["Clock"]["secs"] += 100
    if "Facts" in answer:
        facts = answer["Facts"]["facts"]
        facts["python"]["version"] = "3.9.1"
        facts["python"]["torch"]["version"] = "1.0"
        facts["python"]["torch"]["cuda"] = None
        facts["gpus"]["count"] = 1
        facts["environment"].pop("DS_ACCELERATOR", None)
        facts["memory"]["free"] = 1000
        facts["shm"] = {"size": 2**26, "free": 2**26}
        answer["Facts"]["folder"] = "it is not there"
""",
    )
    doctor = Doctor(servers, tmp_path, "--venv_script", activate)
    assert doctor.code == 1
    failures = [(one["check"], one["text"]) for one in doctor.seen["findings"] if one["level"] == "failure"]
    assert {one["host"] for one in doctor.seen["findings"] if one["level"] == "failure"} == {"worker-2"}, doctor.text
    for check, part in [
        ("clock", "100.0 s ahead of"),
        ("versions", "python has version 3.9.1"),
        ("versions", "torch has version 1.0"),
        ("gpus", "none for slot 1"),
        ("gpus", "torch is built for CPUs"),
        ("folder", "it is not there"),
    ]:
        assert any(check == seen and part in text for seen, text in failures), (check, part, doctor.text)
    warnings = doctor.findings("warning")
    assert ("memory", "worker-2") in warnings and ("shm", "worker-2") in warnings


def can_unshare(*what: str) -> bool:
    return subprocess.run(["unshare", *what, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare("-n"), reason="no network namespaces here")
def test_a_host_that_the_others_cannot_reach(servers: Servers, tmp_path: Path) -> None:
    doctor = Doctor(servers, tmp_path, "--venv_script", disguise(tmp_path, 'exec unshare -n "$REAL" __agent'))
    assert doctor.code == 1
    findings = doctor.findings()
    assert "it does not reach worker-2: 127.0.0.3 port" in findings["connections", "worker-1"], doctor.text
    assert "it does not reach worker-1: 127.0.0.2 port" in findings["connections", "worker-2"], doctor.text


@pytest.mark.skipif(not can_unshare("-m"), reason="no mount namespaces here")
def test_a_folder_that_is_not_shared(servers: Servers, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    own = f'exec unshare -m sh -c \'mount -t tmpfs none {shared} && exec "$0" __agent\' "$REAL"'
    doctor = Doctor(servers, tmp_path, "--shared-folder", shared, "--venv_script", disguise(tmp_path, own))
    assert doctor.code == 1
    findings = doctor.findings()
    assert "does not see what worker-2 wrote" in findings["shared folder", "worker-1"], doctor.text
    assert "does not see what worker-1 wrote" in findings["shared folder", "worker-2"], doctor.text
    assert list(shared.iterdir()) == []
    missing = Doctor(servers, tmp_path, "--shared-folder", tmp_path / "none")
    assert missing.code == 1 and len(missing.findings()) == 2
    assert "it cannot write to" in missing.findings()["shared folder", "worker-1"], missing.text


def test_a_port_that_is_taken(servers: Servers, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        doctor = Doctor(servers, tmp_path, "--master_port", str(port))
        assert doctor.code == 1 and f"={port}: the port is already in use" in doctor.findings()["port", "worker-1"], (
            doctor.text
        )
        assert f"process {os.getpid()}" in doctor.findings()["port", "worker-1"]


def test_arguments_that_name_no_hosts(servers: Servers, tmp_path: Path) -> None:
    unknown = Doctor(servers, tmp_path, "--include", "worker-9")
    assert unknown.code == 2 and "hostname 'worker-9' not found" in unknown.text
    missing = subprocess.run(
        [DEEPSPEED, "doctor", "--hostfile", "none"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert missing.returncode == 2 and "hostfile none does not exist" in missing.stderr


def test_one_host_of_two(servers: Servers, tmp_path: Path) -> None:
    doctor = Doctor(servers, tmp_path, "--exclude", "worker-1")
    assert doctor.code == 0, doctor.text
    assert [host["host"] for host in doctor.seen["examination"]["hosts"]] == ["worker-2"]
