"""Finds the native `deepspeed` command of this installation and becomes it."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


def find() -> Path:
    """The command beside this interpreter, else in the installation's scripts folder, else on PATH."""
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if os.access(folder / "deepspeed", os.X_OK):
            return folder / "deepspeed"
    found = shutil.which("deepspeed")
    if found is None:
        raise FileNotFoundError(
            f"the deepspeed command is neither beside {sys.executable} nor on PATH; "
            "reinstall with: pip install --force-reinstall deepspeed"
        )
    return Path(found)


def become(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by the command with these arguments."""
    command = find()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command, [str(command), *arguments])
