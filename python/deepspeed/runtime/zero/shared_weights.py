"""Stage 3 on one host: the module's parameters become views of the one copy of the weights that all ranks share."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.parameters import TrainedParameters
from deepspeed.runtime.zero.sharded_parameter import Home, mark_sharded


class EngineHome(Home):
    """The engine keeps the weights: programs see them, and write them only within `GatheredParameters`."""

    def __init__(
        self,
        native: _native.Engine,
        group: _native.Group,
        weights: _native.SharedWeights,
        trained: list[torch.nn.Parameter],
    ):
        self.group = group
        # The native engine holds the parameters, so a parameter must not hold it.
        self._native = weakref.ref(native)
        self._weights = weights
        self._indices = {id(p): index for index, p in enumerate(trained)}

    def begin_write(self, parameters: list[torch.nn.Parameter]) -> None:
        """Opens all weights to this rank."""
        self._weights.set_writable(True)

    def end_write(self, parameters: list[torch.nn.Parameter], writer: int | None) -> None:
        """What was written becomes the fp32 masters, too."""
        if writer in (None, self.group.rank):
            self._weights.set_writable(False)
        self.group.barrier("the end of GatheredParameters")
        native = self._native()
        if native is not None:
            native.reload_masters([self._indices[id(p)] for p in parameters if id(p) in self._indices])


class DraftHome(Home):
    """The weights of a module that is built under `zero.Init`, before there is an engine."""

    def __init__(self, group: _native.Group, weights: _native.SharedWeights):
        self.group = group
        self._weights = weights

    def begin_write(self, parameters: list[torch.nn.Parameter]) -> None:
        """Nothing to open: a draft can be written."""

    def end_write(self, parameters: list[torch.nn.Parameter], writer: int | None) -> None:
        """All ranks see what the one that wrote has, and forget what they have written themselves."""
        memory = [(p.data_ptr(), p.numel() * p.element_size()) for p in parameters]
        if writer in (None, self.group.rank):
            for address, size in memory:
                self._weights.publish(address, size)
        self.group.barrier("the end of GatheredParameters")
        for address, size in memory:
            self._weights.refresh(address, size)


def share_weights(
    native: _native.Engine,
    group: _native.Group,
    trained: TrainedParameters,
    frozen: dict[str, torch.nn.Parameter],
    dtype_for: Callable[[torch.dtype], torch.dtype],
) -> None:
    """Makes every parameter a view of the engine's memory, which already holds its values.

    The views cannot be written: the engine does that through a mapping of its own, and programs within
    `GatheredParameters`.
    """
    found = native.shared_weights()
    assert found is not None, "weights are shared only where all ranks of the group share memory"
    weights, trained_addresses, frozen_addresses = found
    home = EngineHome(native, group, weights, trained.tensors)
    parameters = [*trained.tensors, *frozen.values()]
    for parameter, address in zip(parameters, [*trained_addresses, *frozen_addresses], strict=True):
        if address is not None:
            alias(parameter, address, dtype_for(parameter.dtype), weights)
            mark_sharded(parameter, home)


def give_back_after_use(
    native: _native.Engine, module: torch.nn.Module, parameters: list[torch.nn.Parameter]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Weights in a file leave memory when forward is done with their unit: one hook per unit, on the module that owns its
    last parameter. (When backward is, the engine knows itself.)"""
    owners = {id(p): owner for owner in module.modules() for p in owner.parameters(recurse=False)}

    def hook(unit: int) -> Callable[..., None]:
        # The module must not hold the engine.
        engine = weakref.ref(native)

        def used(*_arguments: Any) -> None:
            alive = engine()
            if alive is not None:
                alive.give_back_unit(unit)

        return used

    return [owners[id(parameters[last])].register_forward_hook(hook(unit)) for unit, last in native.units_given_back()]


def alias(parameter: torch.nn.Parameter, address: int, dtype: torch.dtype, owner: Any) -> None:
    """Makes `parameter` a view of memory that lives as long as `owner`."""
    parameter.data = elements_at(address, parameter.numel(), dtype, owner).view(parameter.shape)


def elements_at(address: int, length: int, dtype: torch.dtype, owner: Any) -> torch.Tensor:
    """`length` elements of memory that lives as long as `owner`."""
    memory = (ctypes.c_uint8 * (length * dtype.itemsize)).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]  # an array of ctypes takes any attribute
    return torch.frombuffer(memory, dtype=dtype)
