"""The commands of the Getting Started page for several hosts, word for word: real ssh servers are worker-1 to worker-3, and the
hostfile that is not named lies at /job/hostfile. Both are so in a mount namespace of the test's own only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launched_job import DEEPSPEED
from servers import Servers, why_not

PAGE = Path(__file__).parents[1] / "getting_started" / "scripts"
CLIENT = "client_entry.py --mine 1"
THREE = "worker-1 slots=4\nworker-2 slots=4\nworker-3 slots=4\n"
# Makes the hostfile and the aliases of ssh what the page takes for granted, and runs a line of the page.
AS_ON_THE_PAGE = """
mount --bind "$SSH_CONFIG" /etc/ssh/ssh_config || exit 99
[ -z "$JOB" ] || mount --bind "$JOB" /job || exit 99
eval "$1"
"""


def namespaces_refused() -> str | None:
    if why := why_not():
        return why
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        return "a mount namespace needs CAP_SYS_ADMIN"
    return None


pytestmark = pytest.mark.skipif(namespaces_refused() is not None, reason=str(namespaces_refused()))


class Page:
    """A folder with the page's scripts, a home, and /job with a hostfile unless it is told otherwise."""

    def __init__(self, servers: Servers, tmp_path: Path):
        self.folder, self.home, self.job = (tmp_path / name for name in ("work", "home", "job"))
        for folder in (self.folder, self.home, self.job):
            folder.mkdir()
        shutil.copy(PAGE / "client_entry.py", self.folder)
        shutil.copy(PAGE / "ds_config.json", self.folder)
        (self.job / "hostfile").write_text(THREE)
        self.config = servers.config

    def run(
        self, line: str, env: dict[str, str] | None = None, hostfile: bool = True
    ) -> subprocess.CompletedProcess[str]:
        Path("/job").mkdir(exist_ok=True)  # empty outside of the namespace
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("NCCL", "PYTHON", "UCX", "MV2", "CUDA_VISIBLE"))
        }
        environment |= {
            "PATH": f"{DEEPSPEED.parent}:{os.environ['PATH']}", "HOME": str(self.home), "DS_ACCELERATOR": "cpu",
            "SSH_CONFIG": str(self.config), "JOB": str(self.job) if hostfile else "", "OMP_NUM_THREADS": "1",
        } | (env or {})  # fmt: skip
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", AS_ON_THE_PAGE, "sh", line], cwd=self.folder, env=environment,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def started(self, line: str, hosts: dict[str, int], **options: object) -> subprocess.CompletedProcess[str]:
        """Runs it, and checks that ranks were started on these hosts, as many on each."""
        done = self.run(line, **options)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        counts = [local for slots in hosts.values() for local in range(slots)]
        expected = [
            f"RANK={rank} WORLD_SIZE={len(counts)} LOCAL_RANK={local} --local_rank={local} --mine 1 --deepspeed "
            "--deepspeed_config ds_config.json" for rank, local in enumerate(counts)
        ]  # fmt: skip
        assert sorted(re.findall(r"started with (.*)", done.stdout)) == sorted(expected)
        if len(hosts) > 1:
            assert ": " + ", ".join(f"{host} ({slots})" for host, slots in hosts.items()) + "\n" in done.stderr
        return done


@pytest.fixture
def page(servers: Servers, tmp_path: Path) -> Page:
    return Page(servers, tmp_path)


def test_a_hostfile(page: Page) -> None:
    (page.folder / "myhostfile").write_text("worker-1 slots=4\nworker-2 slots=4\n")
    line = f"deepspeed --hostfile=myhostfile {CLIENT} \\\n  --deepspeed --deepspeed_config ds_config.json"
    page.started(line, {"worker-1": 4, "worker-2": 4})


def test_num_nodes_of_the_default_hostfile(page: Page) -> None:
    line = f"deepspeed --num_nodes=2 \\\n\t{CLIENT} \\\n\t--deepspeed --deepspeed_config ds_config.json"
    page.started(line, {"worker-1": 4, "worker-2": 4})
    line = line.replace("--num_nodes=2", "--num_nodes=2 --num_gpus=1")
    page.started(line, {"worker-1": 1, "worker-2": 1})
    page.started(line.replace("--num_gpus", "--num_accelerators"), {"worker-1": 1, "worker-2": 1})


def test_exclude(page: Page) -> None:
    line = f'deepspeed --exclude="worker-2:0@worker-3:0,1" \\\n\t{CLIENT} \\\n\t--deepspeed --deepspeed_config ds_config.json'
    page.started(line, {"worker-1": 4, "worker-2": 3, "worker-3": 2})


def test_include(page: Page) -> None:
    line = f'deepspeed --include="worker-2:0,1" \\\n\t{CLIENT} \\\n\t--deepspeed --deepspeed_config ds_config.json'
    done = page.started(line.replace("deepspeed ", "deepspeed --force_multi ", 1), {"worker-2": 2})
    assert "2 ranks on 1 host by ssh: worker-2 (2)" in done.stderr
    done = page.started(line, {"worker-2": 2})
    assert "its ranks start here (--force_multi starts them there)" in done.stderr


SHOW = '--no_python --no_local_rank sh -c \'env | grep -E "^(NCCL|PYTHON|UCX|MV2|MINE|OTHER)" | sort | tr "\\n" " "; echo .\''


def test_variables_reach_every_host(page: Page) -> None:
    (page.home / ".deepspeed_env").write_text("NCCL_IB_DISABLE=1\nNCCL_SOCKET_IFNAME=eth0\n")
    (page.folder / ".deepspeed_env").write_text("\nNCCL_SOCKET_IFNAME=lo\n\nMINE=a=b c\n")
    env = {"NCCL_DEBUG": "WARN", "PYTHONHASHSEED": "3", "UCX_TLS": "tcp", "MV2_X": "y", "OTHER": "stays here"}
    done = page.run(f"deepspeed --num_nodes=2 --num_gpus=1 {SHOW}", env)
    expected = (
        "MINE=a=b c MV2_X=y NCCL_DEBUG=WARN NCCL_IB_DISABLE=1 NCCL_SOCKET_IFNAME=lo PYTHONHASHSEED=3 "
        "PYTHONUNBUFFERED=1 UCX_TLS=tcp .\n"
    )
    assert done.stdout == f"{expected}[rank 1] {expected}" or done.stdout == f"[rank 1] {expected}{expected}", (
        done.stderr
    )

    named = page.folder / "other.env"
    named.write_text("MINE=named\n")
    done = page.run(f"deepspeed --num_nodes=2 --num_gpus=1 {SHOW}", {"DS_ENV_FILE": str(named)})
    assert done.stdout.count("MINE=named PYTHONUNBUFFERED=1 .\n") == 2, done.stdout + done.stderr
    (page.home / "job.env").write_text("MINE=by name\n")
    done = page.run(f"deepspeed --num_nodes=2 --num_gpus=1 {SHOW}", {"DS_ENV_FILE": "job.env"})
    assert done.stdout.count("MINE=by name PYTHONUNBUFFERED=1 .\n") == 2, done.stdout + done.stderr


def test_one_node_needs_no_hostfile(page: Page) -> None:
    options = f"{CLIENT} --deepspeed --deepspeed_config ds_config.json"
    page.started(f"deepspeed --include localhost:1 {options}", {"localhost": 1}, hostfile=False)
    done = page.run(f"deepspeed --num_nodes=2 {options}", hostfile=False)
    assert done.returncode == 2 and "looked for /job/hostfile" in done.stderr


@pytest.mark.parametrize(
    ("hostfile", "option", "message"),
    [
        ("worker-1 slots=4\nworker-1 slots=2\n", "", "hostfile:2: hostfile contains multiple entries for worker-1 (the first is"),
        ("worker-1 slots=4\n\nworker-2 slot=4\n", "", "hostfile:3:10: hostfile contains a bad entry: "),
        ("# nobody\n\n", "", "hostfile is empty or not formatted correctly, unable to proceed with launching"),
        (THREE, "--include=a --exclude=b", "include_str and exclude_str are mutually exclusive"),
        (THREE, "--include=worker-l", "hostname 'worker-l' not found in hostfile /job/hostfile; did you mean 'worker-"),
        (THREE, "--include=worker-2:4", "no slot '4' specified on host 'worker-2'; its slots are 0-3"),
        (THREE, "--num_nodes=1 --include=worker-1", "cannot specify num_nodes/gpus with include/exclude"),
        (THREE, "--num_nodes=4", "--num_nodes=4, but"),
    ],
)  # fmt: skip
def test_what_cannot_be(page: Page, hostfile: str, option: str, message: str) -> None:
    (page.job / "hostfile").write_text(hostfile)
    done = page.run(f"deepspeed {option} {CLIENT}")
    assert done.returncode == 2 and message in done.stderr, done.stderr
