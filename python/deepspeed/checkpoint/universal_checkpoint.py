"""Names that files of the original's universal format hold, so that `torch.load` reads these files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SubparamShape:
    """How a parameter that joins several is cut: patterns of names, the joined shape, and the dimension of the cut."""

    patterns: list[str]
    shape: tuple[int, ...]
    partition_dim: int
