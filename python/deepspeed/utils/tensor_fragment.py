"""Looking at, and changing, the fp32 weights, gradients and optimizer state of single parameters.

The `full` functions are collective: every rank calls them, for the same parameter. The `local` ones work on the elements
whose state this rank keeps, as a flat tensor, which may be empty.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.zero.sharded_parameter import is_gathered, true_shape


@dataclass
class fragment_address:
    """Where a part of a parameter lies in flat memory, in elements; checkpoint files of the original hold it."""

    numel: int
    start: int


class TrainedBy:
    """How a parameter finds the engine that trains it."""

    def __init__(self, engine: Any, native: _native.Engine, index: int):
        self._engine = weakref.ref(engine)
        self._native = weakref.ref(native)
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled or copied parameter belongs to no engine.
        return (type(None), ())

    def engine(self) -> Any:
        """The engine; None when it is gone."""
        return self._engine()

    def native(self) -> _native.Engine:
        """The native engine."""
        found = self._native()
        if found is None:
            raise RuntimeError("the engine that trained this parameter is gone")
        return found

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the engine that trained this parameter is gone")
        groups: list[dict[str, Any]] = engine._group_options()
        return groups


def _owner(parameter: torch.nn.Parameter) -> TrainedBy:
    found = getattr(parameter, "_ds_trained_by", None)
    if found is None:
        raise ValueError("no engine trains this parameter: pass a trainable parameter of an initialized model")
    owner: TrainedBy = found
    return owner


def _get_full(parameter: torch.nn.Parameter, kind: str) -> torch.Tensor | None:
    owner = _owner(parameter)
    if kind == "fp32" and parameter.dtype == torch.float32 and not is_gathered(parameter):
        return parameter.detach().clone()
    output = torch.empty(true_shape(parameter), dtype=torch.float32)
    found = _native.read_whole_state(owner.native(), owner.index, kind, owner.groups(), output)
    return output.to(parameter.device) if found else None


def _part(parameter: torch.nn.Parameter, owner: TrainedBy) -> slice:
    start, length = _native.own_range(owner.native(), owner.index)
    return slice(start, start + length)


def _set(parameter: torch.nn.Parameter, value: torch.Tensor, kind: str) -> None:
    """Sets the part of `value`, which has the parameter's shape, that this rank keeps."""
    shape = true_shape(parameter)
    if value.shape != shape:
        raise ValueError(f"the value has shape {tuple(value.shape)}, the parameter {tuple(shape)}")
    owner = _owner(parameter)
    _set_part(parameter, value.detach().reshape(-1)[_part(parameter, owner)], kind)


def _set_part(parameter: torch.nn.Parameter, part: torch.Tensor, kind: str) -> None:
    owner = _owner(parameter)
    native = owner.native()
    part = part.detach().float().cpu().contiguous()
    if not (kind == "fp32" and parameter.dtype == torch.float32 and native.masters_in_place()):
        _native.write_own_state(native, owner.index, kind, owner.groups(), part)
        if kind == "fp32" and is_gathered(parameter):
            home: Any = parameter.ds_home  # type: ignore[attr-defined]
            home.shards_changed()
    if kind == "fp32" and not native.keeps_weights():
        parameter.data.view(-1)[_part(parameter, owner)] = part.to(parameter.dtype)


def safe_get_full_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The fp32 master weights, in the parameter's shape."""
    return _get_full(param, "fp32")


def safe_get_full_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The averaged, unscaled fp32 gradient, between backward and step; None at other times."""
    return _get_full(param, "grad")


def safe_get_full_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """The optimizer's state `optim_state_key` ("exp_avg", "exp_avg_sq"), in the parameter's shape."""
    return _get_full(param, optim_state_key)


def safe_set_full_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replaces master weights, and the weights with them; every rank passes the same value."""
    _set(param, value, "fp32")
    if _owner(param).native().keeps_weights():
        home: Any = param.ds_home  # type: ignore[attr-defined]
        home.group.barrier("safe_set_full_fp32_param")
    else:
        param.data.copy_(value)


def safe_set_full_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replaces the averaged gradient, between backward and step."""
    _set(param, value, "grad")


def safe_set_full_optimizer_state(param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Replaces the optimizer's state `optim_state_key`."""
    _set(param, value, optim_state_key)


def _get_local(parameter: torch.nn.Parameter, kind: str) -> torch.Tensor | None:
    owner = _owner(parameter)
    part = _part(parameter, owner)
    if kind == "fp32" and parameter.dtype == torch.float32 and not is_gathered(parameter):
        return parameter.detach().reshape(-1)[part].clone()
    output = torch.empty(part.stop - part.start, dtype=torch.float32)
    found = _native.read_own_state(owner.native(), owner.index, kind, owner.groups(), output)
    return output.to(parameter.device) if found else None


def safe_get_local_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the fp32 master weights."""
    return _get_local(param, "fp32")


def safe_get_local_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the averaged gradient, between backward and step."""
    return _get_local(param, "grad")


def safe_get_local_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's part of the optimizer's state `optim_state_key`."""
    return _get_local(param, optim_state_key)


def safe_set_local_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replaces this rank's part of the master weights."""
    _set_part(param, value, "fp32")


def safe_set_local_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Replaces this rank's part of the averaged gradient."""
    _set_part(param, value, "grad")


def safe_set_local_optimizer_state(param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Replaces this rank's part of the optimizer's state `optim_state_key`."""
    _set_part(param, value, optim_state_key)
