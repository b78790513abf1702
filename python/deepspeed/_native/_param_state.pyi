"""Masters, gradients and optimizer state of single parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepspeed._native._engine import Engine

def own_range(engine: Engine, index: int) -> tuple[int, int]:
    """First element, and number of elements, of parameter `index` whose state this rank keeps."""

def read_whole_state(
    engine: Engine, index: int, kind: str, param_groups: Sequence[Mapping[str, Any]], output: torch.Tensor
) -> bool:
    """The whole of "fp32", "grad" or an optimizer state of parameter `index` into `output` (fp32). False where there is
    no such state. Collective."""

def read_own_state(
    engine: Engine, index: int, kind: str, param_groups: Sequence[Mapping[str, Any]], output: torch.Tensor
) -> bool:
    """This rank's part, the elements of `own_range`, into `output`."""

def write_own_state(
    engine: Engine, index: int, kind: str, param_groups: Sequence[Mapping[str, Any]], values: torch.Tensor
) -> bool:
    """Sets this rank's part, the elements of `own_range`, to `values` (fp32)."""
