"""Weights of which a host has one copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch

from deepspeed._native._group import Group

@final
class SharedWeights:
    """Memory that tensors of all ranks of a host alias; it lives as long as this."""

    def set_writable(self, writable: bool) -> None:
        """Lets the program of this rank write the weights, or no longer. A draft can be written all the time."""

    def publish(self, address: int, bytes: int) -> None:
        """Shows all ranks what this rank has written to a tensor of a draft."""

    def refresh(self, address: int, bytes: int) -> None:
        """Forgets what this rank alone has written to a tensor of a draft."""

def share_draft(
    group: Group, tensors: Sequence[tuple[str, torch.Tensor, torch.dtype]], folder: Path | None = None
) -> tuple[SharedWeights, list[int]]:
    """Moves tensors of a model that is being built, with the dtype to keep them in, into memory that all ranks share,
    with rank 0's values; with a `folder`, into a file there. Returns what keeps the memory alive and each tensor's address."""
