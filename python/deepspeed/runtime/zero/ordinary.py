"""The way out of stage 3: a module's parameters become ordinary ones again."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.runtime.zero.sharded_parameter import is_sharded, true_shape, unmark_sharded


def held_elsewhere(module: torch.nn.Module) -> set[str]:
    """The names of sharded parameters that are not whole here and now."""
    return {name for name, p in module.named_parameters() if is_sharded(p) and p.shape != true_shape(p)}


def make_ordinary(module: torch.nn.Module) -> None:
    """Gives every sharded parameter memory of its own, on this rank alone, and destroys the engine that kept it. Those that
    are not whole become zeros."""
    sharded: list[Any] = [p for p in module.parameters() if is_sharded(p)]
    values = [
        p.detach().clone() if p.shape == true_shape(p) else torch.zeros(true_shape(p), dtype=p.dtype, device=p.device)
        for p in sharded
    ]
    trained = [p._ds_trained_by for p in sharded if getattr(p, "_ds_trained_by", None) is not None]
    for engine in {owner.engine() for owner in trained} - {None}:
        engine.destroy()
    for p, value in zip(sharded, values, strict=True):
        p.data = value
        unmark_sharded(p)
