"""Puts the toy models of the engine's tests on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engine"))


def listed(folder: "str | Path") -> list[str]:
    """What is in a checkpoint directory, but for the scripts that are put beside checkpoints."""
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix != ".py")
