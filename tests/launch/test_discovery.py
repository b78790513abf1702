"""Programs that mpirun or srun has started without the `deepspeed` command: they find each other."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_cluster import Cluster

SCRIPTS = Path(__file__).parent / "scripts"
LAUNCHERS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ranks(line: list[str], env: dict[str, str] | None = None) -> tuple[str, str]:
    """Output and errors of `who.py` under `line`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_OWN}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [*line, sys.executable, str(SCRIPTS / "who.py"), str(port)], env=environment, text=True, capture_output=True,
        timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout, done.stderr


OPEN_MPI = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-np", "2"]


@pytest.mark.parametrize("line", [OPEN_MPI, ["mpirun.mpich", "-np", "2"]], ids=["openmpi", "mpich"])
def test_ranks_of_mpirun_find_each_other(line: list[str]) -> None:
    if shutil.which(line[0]) is None:
        pytest.skip(f"{line[0]} is not installed")
    out, err = ranks(line)
    assert sorted(out.splitlines()) == [f"found {rank} 2 {rank} 2 127.0.0.1, 3 together" for rank in (0, 1)], out + err


def test_tasks_of_srun_find_each_other(cluster: Cluster) -> None:
    out, err = ranks(["srun", "-N", "1", "-n", "2"], cluster.environment)
    assert sorted(out.splitlines()) == [f"found {rank} 2 {rank} 2 127.0.0.1, 3 together" for rank in (0, 1)], out + err
    # The first host's name is one that only Slurm knows: the user's word on it holds.
    out, err = ranks(["srun", "-N", "2", "-n", "2"], {**cluster.environment, "MASTER_ADDR": "127.0.0.1"})
    assert sorted(out.splitlines()) == [f"found {rank} 2 0 1 127.0.0.1, 3 together" for rank in (0, 1)], out + err
