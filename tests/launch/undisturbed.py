"""What a training script prints on ranks of this machine that nothing happens to."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

from harness import run_outcomes


def _play(script: str, arguments: list[str]) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def losses_of(script: Path, world: int, *arguments: str | Path) -> list[str]:
    """`step N loss X` of rank 0. The ranks are forked with torch imported."""
    outcomes = run_outcomes(_play, world, str(script), [str(word) for word in arguments], deadline=120)
    for outcome in outcomes:
        assert outcome.ok, outcome.describe()
    return re.findall(r"step \d loss \S+", outcomes[0].output)
