"""docs/api.md is what the docstrings say, and they say something about every public name."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools/api_reference.py"))


def test_the_page_is_what_the_docstrings_say() -> None:
    # In a process of its own: torch gives an optimizer's class another `step` once there is an optimizer.
    command = [sys.executable, ROOT / "tools/api_reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_everything_on_the_page_is_documented(tool: dict[str, Any]) -> None:
    names = {module: tool["find"](module) for module in tool["MODULES"]}
    silent = [f"{m}.{n}" for m, members in tool["MODULES"].items() for n in members if not getattr(names[m], n).__doc__]
    assert silent == []
