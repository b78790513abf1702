"""`python -m deepspeed.launcher...` reaches the native command. The command itself is tested in crates/launch."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

import pytest

from harness import run_command

_ECHO = """#!/bin/sh
printf '%s\\n' "$@"
case $1 in --hostfile=*) cat "${1#--hostfile=}" ;; esac
exit 7
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """An interpreter with a stand-in for the native command beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec -a "$0" {sys.executable} "$@"\n')
    command = folder / "deepspeed"
    command.write_text(_ECHO)
    for path in (python, command):
        path.chmod(0o755)
    return python


def run(folder: Path, module: str, *arguments: str) -> tuple[int | None, list[str]]:
    program = (
        f"import sys, runpy; sys.executable = {str(folder / 'python')!r}; sys.argv = ['x', *sys.argv[1:]]; "
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    done = run_command([sys.executable, "-c", program, *arguments])
    return done.code, done.stdout.splitlines()


def test_runner_hands_its_arguments_over(interpreter: Path) -> None:
    arguments = ["--num_gpus", "2", "train.py", "--lr", "0 1", "--deepspeed"]
    assert run(interpreter.parent, "deepspeed.launcher.runner", *arguments) == (7, arguments)


def test_modules_that_stand_for_commands(interpreter: Path) -> None:
    for module, words in [("deepspeed", []), ("deepspeed.env_report", ["__run", "report"])]:
        assert run(interpreter.parent, module, "--json") == (7, [*words, "--json"])


def test_launch_translates_world_info(interpreter: Path) -> None:
    world = base64.urlsafe_b64encode(json.dumps({"worker-1": [0, 2]}).encode()).decode()
    code, arguments = run(
        interpreter.parent,
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        "--node_rank=0",
        "--master_addr=127.0.0.1",
        "--master_port=29501",
        "--no_local_rank",
        "train.py",
        "--world_info",
        "mine",
    )
    assert (code, arguments) == (
        7,
        [
            "--include=localhost:0,2",
            "--master_addr=127.0.0.1",
            "--master_port=29501",
            "--no_local_rank",
            "train.py",
            "--world_info",
            "mine",
        ],
    )


def test_launch_of_one_of_several_hosts(interpreter: Path) -> None:
    world = base64.urlsafe_b64encode(json.dumps({"worker-1": [0, 2], "worker-2": [1]}).encode()).decode()
    arguments = [f"--world_info={world}", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29501", "train.py"]
    code, said = run(interpreter.parent, "deepspeed.launcher.launch", *arguments)
    assert code == 7 and said[0].startswith("--hostfile=/dev/fd/")
    assert said[1:] == [
        "--include=worker-1:0,2@worker-2:1",
        "--no_ssh",
        "--node_rank=1",
        "--master_addr=10.0.0.1",
        "--master_port=29501",
        "train.py",
        "worker-1 slots=3",
        "worker-2 slots=2",
    ]


def test_a_missing_command_says_how_to_get_it(tmp_path: Path) -> None:
    program = (
        "import sys, sysconfig; from pathlib import Path; from deepspeed.launcher import _native_command as c\n"
        f"sys.executable = '{tmp_path}/python'; sysconfig.get_path = lambda name: '{tmp_path}'\n"
        "c.find()"
    )
    done = run_command([sys.executable, "-c", program], env={"PATH": os.fspath(tmp_path)})
    assert "pip install --force-reinstall deepspeed" in done.stderr
