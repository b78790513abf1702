"""Reducing units during backward: one hook per unit, which tells the native engine that gradients have come."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from deepspeed import _native


class UnitHooks:
    """Keeps one hook per unit, on the parameter whose gradient comes last.

    Which one that is shows in the first passes: a hook that fires too early moves to a parameter that was missing.
    Until then, and wherever the order changes, the unit is reduced at the end of the pass; the numbers are the same.
    """

    def __init__(
        self,
        native: _native.Engine,
        tensors: Sequence[torch.nn.Parameter],
        loss_facts: Callable[[], tuple[bool, bool]],
        on_gradient: Callable[[int], None] | None = None,
    ):
        self._native = native
        self._tensors = tensors
        self._loss_facts = loss_facts
        self._on_gradient = on_gradient  # is told of a unit's gradients before they are reduced
        self._missing: dict[int, int] = {}
        self._handles = {}
        if native.stage() >= 2:
            # Backward goes through a module from its output to its input: its first parameter is likely the last.
            self._handles = {unit: self._hook(unit, members[0]) for unit, members in enumerate(native.units())}

    def _hook(self, unit: int, index: int) -> torch.utils.hooks.RemovableHandle:
        # The native engine holds the parameters, so a parameter must not hold it.
        alive = weakref.ref(self)

        def fired(_parameter: torch.Tensor) -> None:
            hooks = alive()
            if hooks is not None:
                hooks._fired(unit)

        return self._tensors[index].register_post_accumulate_grad_hook(fired)

    def _fired(self, unit: int) -> None:
        if self._on_gradient is not None:
            self._on_gradient(unit)
        scaled, averaged = self._loss_facts()
        missing = self._native.unit_complete(unit, scaled, averaged)
        if missing is not None:
            self._missing[unit] = missing

    def settle(self) -> None:
        """Moves the hooks that fired too early; called when a pass is over."""
        for unit, index in self._missing.items():
            self._handles[unit].remove()
            self._handles[unit] = self._hook(unit, index)
        self._missing.clear()

    def remove(self) -> None:
        """Takes all hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
