"""Weights that are gathered from the ranks for the time of their use."""

from collections.abc import Sequence
from typing import Any, final

import torch

from deepspeed._native._engine import Engine
from deepspeed._native._group import Group

@final
class Gathering:
    """The units of an engine that gathers its weights, and which of them are whole."""

    def __new__(
        cls,
        engine: Engine,
        parameters: Sequence[torch.Tensor],
        modules: Sequence[tuple[str, bool, bool, Sequence[int]]],
        statuses: tuple[Any, Any],
    ) -> Gathering:
        """Releases `parameters`, trained and then frozen, whose weights `engine` has. `modules` are those of the tree, the
        root first: path, whether it can be called, whether it is a leaf, the numbers of its own parameters. `statuses`
        are what `ds_status` says of a whole and of a released parameter."""

    def modules(self) -> list[tuple[int, int, bool]]:
        """The modules to watch: index in the tree, number, whether it gathers units (or only needs them in backward)."""

    def param_units(self) -> list[int | None]:
        """By parameter, its unit; None for one without elements."""

    def own_parts(self) -> list[tuple[int, int]]:
        """By parameter, the address and the number of the elements that this rank keeps."""

    def is_active(self, unit: int) -> bool:
        """Whether a running module uses `unit`."""

    def is_running(self) -> bool:
        """Whether a module is running."""

    def live(self) -> int:
        """Elements that are whole now."""

    def enter(self, number: int, grad: bool, in_backward: bool) -> None:
        """The forward of module `number` begins."""

    def leave(self, number: int, grad: bool, in_backward: bool, hidden: bool) -> None:
        """The forward of module `number` is over; `hidden` says that its backward may not show when it begins."""

    def borrow(self, unit: int, grad: bool, in_backward: bool) -> None:
        """A parameter of `unit` is read by a module that does not gather it."""

    def enter_backward(self, number: int, visible: bool) -> int:
        """The backward of a call of module `number` begins; `visible` says whether `leave_backward` will be called."""

    def leave_backward(self, call: int) -> None:
        """The gradients of everything that went into the call are there."""

    def gradient(self, unit: int) -> None:
        """A gradient of `unit` has come, perhaps the last."""

    def end_pass(self) -> None:
        """The backward pass is over."""

    def updated(self) -> None:
        """The engine's shards have new values."""

    def pin(self, numbers: Sequence[int]) -> None:
        """Makes these parameters whole until `unpin`. Collective."""

    def unpin(self, numbers: Sequence[int]) -> None:
        """Takes `pin` back."""

    def store(self, numbers: Sequence[int], root: int | None) -> None:
        """Takes what rank `root` (with None, every rank) has written to these pinned parameters into shards and masters."""

def load_weight(engine: Engine, number: int, whole: torch.Tensor) -> None:
    """Gives the engine a whole parameter, by number: this rank keeps its part."""

def gather_parts(group: Group, what: str, part: torch.Tensor, whole: torch.Tensor) -> None:
    """Fills `whole` with the equally long parts of all ranks, one after another, as far as it reaches. Collective."""
