"""The update kernels, for optimizers that run without the engine."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

def optimizer_defaults(kind: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters of an optimizer, the given ones checked and the others at their defaults."""

def optimizer_state_names(kind: str, group: Mapping[str, Any]) -> list[str]:
    """The names of the fp32 state tensors that a group with these hyperparameters has beside `step`."""

def optimizer_step(
    kind: str,
    group: Mapping[str, Any],
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[Sequence[torch.Tensor]],
    steps: Sequence[int],
    threads: int,
) -> None:
    """One update of every parameter of a group, in place.

    group   the `param_groups` element; keys that are no hyperparameters are left alone.
    params, grads, states   one entry per parameter, of one length; states fp32.
    steps   per parameter, how many updates it has had, this one included.
    threads at most this many work at it.
    """
