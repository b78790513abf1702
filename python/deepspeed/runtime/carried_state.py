"""State that a client's optimizer holds before the engine takes over: cut into the shards, or refused."""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

import torch

from deepspeed.runtime.parameters import TrainedParameters


def is_elementwise(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether a value of the state belongs to the elements one by one, so that it can be cut as the parameter is."""
    return isinstance(value, torch.Tensor) and key != "step" and value.shape == shape


def check_sharding(state: dict[str, Any], name: str, p: torch.Tensor) -> None:
    """Raises ValueError for state that is not elementwise and no number either: a shard of it means nothing."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.numel() > 1 and not is_elementwise(key, value, p.shape):
            raise ValueError(
                f"the optimizer came with state, and `{key}` {list(value.shape)} of parameter `{name}` {list(p.shape)} "
                "cannot be cut into shards: use ZeRO stage 0, or pass the optimizer without state and continue with "
                "engine.load_checkpoint()"
            )


def part_of_state(state: dict[str, Any], p: torch.Tensor, part: slice | None) -> dict[str, Any]:
    """The state of the elements `part` of parameter `p`, or of all of it, for an fp32 master of them."""
    carried: dict[str, Any] = {}
    for key, value in state.items():
        if is_elementwise(key, value, p.shape):
            values = value.detach().contiguous()
            values = values if part is None else values.view(-1)[part]
            carried[key] = values.float() if values.is_floating_point() else values.clone()
            if carried[key].data_ptr() == value.data_ptr():
                carried[key] = carried[key].clone()
        else:
            carried[key] = value
    return carried


def refuse_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if an optimizer whose steps the engine takes itself came with state."""
    count = sum(1 for state in optimizer.state.values() if state)
    if count:
        raise ValueError(
            f"{type(optimizer).__name__} came with state of {count} parameters (steps that it took, or "
            "load_state_dict), and the engine keeps the state of its own optimizers itself, from the first step on: "
            "continue with engine.load_checkpoint(), or pass the torch.optim class of this kind, whose state is taken over"
        )


def describe_state(optimizer: torch.optim.Optimizer | None, trained: TrainedParameters) -> list[str]:
    """What the optimizer holds for each trained parameter, so that ranks can see whether they hold the same."""
    described = []
    for name, p in zip(trained.names, trained.tensors, strict=True):
        state = optimizer.state.get(p) if optimizer is not None else None
        if state:
            values = ", ".join(f"{key} {_brief(value)}" for key, value in state.items())
            described.append(f"{name}: {values}")
    return described


def _brief(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() == 1:
        return f"{value.item():g}"
    dense = value.detach().cpu().contiguous()
    memory = (ctypes.c_char * dense.nbytes).from_address(dense.data_ptr()) if dense.nbytes else b""
    return f"{list(value.shape)} with checksum {zlib.crc32(memory):08x}"
