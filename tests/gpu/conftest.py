"""The GPU's tests train the models of tests/stage3."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "stage3"))
