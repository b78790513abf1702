"""A Slurm cluster on one machine: munged, slurmctld and a slurmd for each node, with folder, keys and ports of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_PATH = "/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", "")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")


def why_no_slurm() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)" if missing else None


class Cluster:
    """Nodes `worker-1`, `worker-2`, ... with CPUs for several jobs at once; a context manager that ends the daemons and all their jobs.

    environment: what srun and its like need to find it.
    """

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.names = [f"worker-{number}" for number in range(1, count + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The nodes first: they end what still runs on them.
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self) -> None:
        # munge's and Slurm's condition: nobody else may write on the way to their files.
        self.folder.chmod(0o755)
        munge = self.folder / "munge"
        munge.mkdir()
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "log-file": munge / "log"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--seed-file={munge / 'seed'}", *options)
        ports = _free_ports(1 + len(self.names))
        host = socket.gethostname().split(".")[0]
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={munge / 'socket'}",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmctldPidFile={self.folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={self.folder / 'slurmd-%n.pid'}",
            f"SlurmdSpoolDir={self.folder / 'spool-%n'}",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "KillWait=2",
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=32"
                for name, port in zip(self.names, ports[1:], strict=True)
            ),
            "PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        self._daemon("slurmctld", "-D", "-c")
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name)
        self._await_nodes()

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=_PATH)
        assert program is not None
        with open(self.folder / f"{name}-{len(self._daemons)}.log", "wb") as log:
            daemon = subprocess.Popen(
                [program, *arguments], env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)
        if name == "munged":
            self._await(lambda: (self.folder / "munge" / "socket").exists())

    def _await_nodes(self) -> None:
        def idle() -> bool:
            command = ["sinfo", "--noheader", "--Node", "--format=%T"]
            done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
            return done.stdout.split() == ["idle"] * len(self.names)

        self._await(idle)

    def _await(self, is_there: object) -> None:
        until = time.monotonic() + 30
        assert callable(is_there)
        while not is_there():
            alive = all(daemon.poll() is None for daemon in self._daemons)
            assert alive and time.monotonic() < until, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')}" for path in self.folder.glob("*.log"))


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()
