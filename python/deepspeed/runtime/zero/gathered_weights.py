"""Stage 3 where ranks share no memory: each rank keeps a part of every parameter, and units are gathered for use."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.parameters import TrainedParameters
from deepspeed.runtime.zero.gather_hooks import GatherHooks
from deepspeed.runtime.zero.sharded_parameter import (
    Home,
    ZeroParamStatus,
    is_gathered,
    is_sharded,
    mark_sharded,
    partition_numel,
)
from deepspeed.runtime.zero.shared_weights import elements_at

# Bytes of whole parameters that are released while a model is built before the heap is asked to let them go.
_GIVEN_BACK = 8 << 20


class GatheredHome(Home):
    """The engine keeps this rank's part of the weights, and gathers what is asked for."""

    gathers = True

    def __init__(self, group: _native.Group, hooks: GatherHooks):
        self.group = group
        # What gathers holds the parameters, so a parameter must not hold it.
        self._hooks = weakref.ref(hooks)
        self._all = range(len(hooks.numbers))

    def _found(self) -> GatherHooks:
        hooks = self._hooks()
        if hooks is None:
            raise RuntimeError("the engine that keeps this parameter's weights is gone")
        return hooks

    def _numbers(self, parameters: list[torch.nn.Parameter]) -> list[int]:
        numbers = self._found().numbers
        return [numbers[id(p)] for p in parameters] or list(self._all)

    def begin_read(self, parameters: list[torch.nn.Parameter]) -> None:
        """Makes them whole (all, for none). Collective."""
        self._found().native.pin(self._numbers(parameters))

    def end_read(self, parameters: list[torch.nn.Parameter]) -> None:
        """They need not be whole any more."""
        self._found().native.unpin(self._numbers(parameters))

    def end_write(self, parameters: list[torch.nn.Parameter], writer: int | None) -> None:
        """What rank `writer` has written, or with None every rank, becomes the weights and the fp32 masters."""
        self._found().native.store(self._numbers(parameters), writer)

    def unit_of(self, parameter: torch.nn.Parameter) -> int | None:
        """With what else the parameter is gathered."""
        return self._found().unit_of(parameter)

    def shards_changed(self) -> None:
        """The engine's shards have new values."""
        self._found().native.updated()


class SlicedHome(Home):
    """The weights of a module that is built under `zero.Init`, before there is an engine: each rank has an equal part, in
    memory or, with a `folder`, in files there."""

    gathers = True

    def __init__(self, group: _native.Group, folder: Path | None):
        self.group = group
        self._folder = folder
        self._freed = 0

    def adopt(self, parameter: torch.nn.Parameter, name: str, dtype: torch.dtype) -> None:
        """Keeps this rank's part of rank 0's values, in `dtype`. Collective."""
        p: Any = parameter
        p.ds_name, p.ds_pins, p.ds_part = name, 0, None
        parameter.data = parameter.data.cpu().to(dtype).contiguous()
        mark_sharded(parameter, self)
        self._share(p, 0)
        self._release(p)

    def begin_read(self, parameters: list[torch.nn.Parameter]) -> None:
        """Makes them whole. Collective."""
        for p in parameters:
            self._pin(p)

    def end_read(self, parameters: list[torch.nn.Parameter]) -> None:
        """They need not be whole any more."""
        for p in parameters:
            self._unpin(p)

    def end_write(self, parameters: list[torch.nn.Parameter], writer: int | None) -> None:
        """All ranks take their parts of what rank `writer` has written."""
        for p in parameters:
            self._share(p, writer or 0)

    def _pin(self, p: Any) -> None:
        self.check(p)
        p.ds_pins += 1
        if p.ds_status is ZeroParamStatus.AVAILABLE:
            return
        whole = torch.empty(p.ds_shape, dtype=p.dtype)
        _native.gather_parts(self.group, p.ds_name, p.ds_tensor, whole)
        p.data, p.ds_status = whole, ZeroParamStatus.AVAILABLE

    def _unpin(self, p: Any) -> None:
        p.ds_pins -= 1
        if p.ds_pins == 0:
            self._release(p)

    def _release(self, p: Any) -> None:
        p.data, p.ds_status = torch.empty(0, dtype=p.dtype), ZeroParamStatus.NOT_AVAILABLE
        p.ds_version = p._version
        self._freed += p.ds_numel * p.dtype.itemsize
        if self._freed >= _GIVEN_BACK:
            # The heap keeps what is freed below something that is not, and would come to hold the whole model.
            _native.Engine.give_back_freed()
            self._freed = 0

    def check(self, p: Any) -> None:
        """Raises RuntimeError if the program wrote to the parameter while it was released."""
        if p.ds_status is ZeroParamStatus.NOT_AVAILABLE and p._version != p.ds_version:
            raise RuntimeError(
                f"{p.ds_name} was written to while each rank had only a part of it, and what was written is lost: under "
                "deepspeed.zero.Init a module that changes parameters of modules it has made does so within "
                "deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)"
            )

    def _share(self, p: Any, writer: int) -> None:
        self.group.broadcast({p.ds_name: p.data}, writer)
        length = partition_numel(p)
        mine = p.data.view(-1)[self.group.rank * length : (self.group.rank + 1) * length]
        if p.ds_part is None:
            p.ds_part = _zeros(length, p.dtype)
        part = p.ds_part
        part[: mine.numel()] = mine
        if self._folder is not None:
            p.ds_part = None
            mapped, (address,) = _native.share_draft(_native.Group.alone(), [(p.ds_name, part, p.dtype)], self._folder)
            part = elements_at(address, length, p.dtype, mapped)
        mark_sharded(p, self, part)


def gather_weights(
    native: _native.Engine,
    group: _native.Group,
    module: torch.nn.Module,
    trained: TrainedParameters,
    frozen: dict[str, torch.nn.Parameter],
) -> GatherHooks:
    """Leaves the weights to the engine, which has its part of those that are whole and gets those built under Init."""
    parameters = [*trained.tensors, *frozen.values()]
    for number, parameter in enumerate(parameters):
        p: Any = parameter
        if not is_sharded(p):
            p.ds_shape, p.ds_numel = p.shape, p.numel()
        elif p.numel() < p.ds_numel:
            p.ds_home.begin_read([p])
            _native.load_weight(native, number, p.data)
            p.ds_home.end_read([p])
            p.ds_tensor, p.ds_part = torch.empty(0, dtype=p.dtype), None  # the engine has this part now
    hooks = GatherHooks(native, module, parameters)
    home = GatheredHome(group, hooks)
    own = native.own_tensors()
    if own is None:
        addresses = zip(parameters, hooks.native.own_parts(), strict=True)
        own = [_part(address, length, p.dtype) for p, (address, length) in addresses]
    for parameter, part in zip(parameters, own, strict=True):
        mark_sharded(parameter, home, part)
    return hooks


def let_go(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The engine that keeps the weights goes away; parameters stay released."""
    for p in parameters:
        if isinstance(getattr(p, "ds_home", None), GatheredHome):
            mark_sharded(p, p.ds_home, torch.empty(0, dtype=p.dtype))  # type: ignore[attr-defined]


def whole_state_dict(module: torch.nn.Module, prefix: str = "", keep: bool = True) -> dict[str, Any]:
    """The module's state dict with copies of whole parameters, gathered unit by unit; with `keep` False this rank only
    takes part. Collective."""
    state = {prefix + name: value for name, value in module.state_dict(keep_vars=True).items()}
    units: dict[Any, list[tuple[str, Any]]] = {}
    for name, value in state.items():
        unit = value.ds_home.unit_of(value) if is_gathered(value) else None
        if unit is not None:
            units.setdefault((value.ds_home, unit), []).append((name, value))
    for (home, _), members in units.items():
        parameters = [value for _, value in members]
        home.begin_read(parameters)
        for name, value in members:
            state[name] = value.detach().clone() if keep else None
        home.end_read(parameters)
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def unshare_drafts(module: torch.nn.Module) -> None:
    """Gives every rank whole copies of parameters that were built under Init: below stage 3. Collective."""
    for parameter in module.parameters():
        home: Any = getattr(parameter, "ds_home", None)
        if isinstance(home, SlicedHome):
            home.begin_read([parameter])


def _zeros(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that lasts, apart from the heap: whole parameters come and go there, and parts between them would keep it from
    shrinking."""
    size = length * dtype.itemsize
    if size < mmap.PAGESIZE:
        return torch.zeros(length, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype)


def _part(address: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The engine's memory; `let_go` takes the tensor away before that goes."""
    if length == 0:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_uint8 * (length * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
