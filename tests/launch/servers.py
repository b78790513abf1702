"""Hosts for the launcher: real ssh servers on loopback addresses, with keys, ports and configuration of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))


def why_not() -> str | None:
    """Why there can be no servers here; None where there can."""
    if os.geteuid() != 0:
        return "starting sshd needs root"
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "sshd, ssh or ssh-keygen is not installed (apt-get install openssh-server)"
    return None


class Servers:
    """`worker-1`, `worker-2`, ... at 127.0.0.2, 127.0.0.3, ...; a context manager that ends them and all their sessions."""

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.names = [f"worker-{number}" for number in range(1, count + 1)]
        self.config = folder / "ssh_config"
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Servers:
        # sshd's own condition where it separates privileges, which is always.
        Path("/run/sshd").mkdir(exist_ok=True)
        self._key("user")
        self._key("host")
        keys = self.folder / "authorized_keys"
        keys.write_text((self.folder / "user.pub").read_text())
        host_key = (self.folder / "host.pub").read_text()
        blocks, known = [], []
        for index, name in enumerate(self.names):
            address = f"127.0.0.{index + 2}"
            port = _free_port(address)
            self._serve(name, address, port, keys)
            known.append(f"{name} {host_key}")
            blocks.append(
                f"Host {name}\n  HostName {address}\n  Port {port}\n  HostKeyAlias {name}\n  User root\n"
                f"  IdentityFile {self.folder / 'user'}\n  IdentitiesOnly yes\n"
                f"  UserKnownHostsFile {self.folder / 'known_hosts'}\n  GlobalKnownHostsFile /dev/null\n"
            )
        (self.folder / "known_hosts").write_text("".join(known))
        self.config.write_text("\n".join(blocks))
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.terminate()
            server.wait(10)

    def hostfile(self, slots: int) -> Path:
        """Of the first two, with so many slots each."""
        path = self.folder / f"hostfile-{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names[:2]))
        return path

    def config_where(self, folder: Path, edit: Callable[[str], str]) -> Path:
        """The configuration of ssh with another block for the second server, in `folder`."""
        blocks = self.config.read_text().split("\n\n")
        blocks[1] = edit(blocks[1])
        path = folder / "ssh_config"
        path.write_text("\n\n".join(blocks))
        return path

    def _key(self, name: str) -> None:
        path = self.folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=20)

    def _serve(self, name: str, address: str, port: int, keys: Path) -> None:
        config = self.folder / f"{name}.conf"
        config.write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey {self.folder / 'host'}\nAuthorizedKeysFile {keys}\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"StrictModes no\nUsePAM no\nMaxStartups 100\nPidFile {self.folder / name}.pid\n"
        )
        assert SSHD is not None
        log = open(self.folder / f"{name}.log", "wb")  # noqa: SIM115
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log, stdin=subprocess.DEVNULL)
        log.close()
        self._servers.append(server)
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
                return
            assert server.poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < until, "sshd does not listen"
            time.sleep(0.02)

    def sessions(self) -> list[int]:
        """The processes of the servers that each serve one connection."""
        return [child for server in self._servers for child in children(server.pid)]


def _free_port(address: str) -> int:
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                    found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
