"""A module's weights into one file, whole or not at all, with as few of them in memory at a time as can be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.zero.gathered_weights import whole_state_dict
from deepspeed.runtime.zero.sharded_parameter import is_gathered

# What both file formats hold; anything else is for torch.save.
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip


def save_weights(module: torch.nn.Module, folder: str, name: str, without: set[str], writes: bool) -> None:
    """Writes the module's state dict, but for the names `without`, as `folder/name`: as safetensors if the name says so,
    else as torch.save does. Where units are gathered it is collective, and only rank 0 `writes`; one unit at a time is
    whole then."""
    values = {key: it for key, it in module.state_dict(keep_vars=True).items() if key not in without}
    strange = [key for key, value in values.items() if not _is_plain(value)]
    if not strange:
        _save_in_turn(values, folder, name, writes)
    elif name.endswith(".safetensors"):
        raise ValueError(
            f"a safetensors file holds tensors only, and `{strange[0]}` of the state dict is a "
            f"{type(values[strange[0]]).__name__}: save under a name that ends in .bin"
        )
    else:
        state = whole_state_dict(module, keep=writes)
        if writes:
            _save_anything({key: value for key, value in state.items() if key not in without}, folder, name)


def _is_plain(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.dtype in _DTYPES and value.is_contiguous()


def _save_in_turn(values: dict[str, torch.Tensor], folder: str, name: str, writes: bool) -> None:
    first: dict[int, str] = {}
    tied = [(key, kept) for key, it in values.items() if (kept := first.setdefault(id(it), key)) != key]
    stored = {key: values[key] for key in first.values()}
    alone, units = _in_turn(stored)
    order = [*alone, *(key for members in units for key in members)]
    file, problem = None, None
    try:
        if writes:
            entries = [(key, list(_whole_shape(stored[key])), str(stored[key].dtype)) for key in order]
            file = _native.ModelFile(folder, name, entries, tied)
    except _native.CheckpointError as error:
        problem = error
    for key, tensor in _whole(stored, alone, units):
        # The others wait in the next gather for a rank whose disk is full.
        try:
            if file is not None and problem is None:
                file.write(key, tensor.detach())
        except _native.CheckpointError as error:
            problem = error
    if problem is not None:
        raise problem
    if file is not None:
        file.finish()


def _in_turn(values: dict[str, torch.Tensor]) -> tuple[list[str], list[list[str]]]:
    """Names of tensors that are whole, the widest elements first as safetensors wants them, and of each unit to gather."""
    alone: list[str] = []
    units: dict[Any, list[str]] = {}
    for key, value in values.items():
        home: Any = getattr(value, "ds_home", None)
        unit = home.unit_of(value) if is_gathered(value) else None
        (alone if unit is None else units.setdefault((id(home), unit), [])).append(key)
    alone.sort(key=lambda key: -values[key].element_size())
    return alone, list(units.values())


def _whole(
    values: dict[str, torch.Tensor], alone: list[str], units: list[list[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for key in alone:
        yield key, values[key]
    for members in units:
        parameters = [values[key] for key in members]
        home: Any = parameters[0].ds_home  # type: ignore[attr-defined]
        home.begin_read(parameters)
        yield from zip(members, parameters, strict=True)
        home.end_read(parameters)


def _whole_shape(value: Any) -> torch.Size:
    return value.ds_shape if is_gathered(value) else value.shape


def _save_anything(state: dict[str, Any], folder: str, name: str) -> None:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
