"""The torch device's tests train the models of tests/stage3 and tests/engine."""

import sys
from pathlib import Path

for folder in ("stage3", "engine"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
