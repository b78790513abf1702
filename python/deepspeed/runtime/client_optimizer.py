"""A client's torch optimizer on the engine's fp32 masters: its steps, and its state in checkpoints."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.carried_state import check_sharding, is_elementwise, part_of_state
from deepspeed.runtime.parameters import TrainedParameters

# Per parameter, the values of the optimizer's state that are no tensors of the parameter's size: step counts, say.
Scalars = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Fragment:
    """The part of a parameter that this rank saves, and (on shards) steps on."""

    index: int
    offset: int
    length: int


class ClientOptimizer:
    """Runs a torch optimizer on the masters: on whole parameters at stage 0, on this rank's shards above.

    The parameters in the optimizer's groups are replaced by the tensors that it works on.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        native: _native.Engine,
        trained: TrainedParameters,
        dtype_for: Callable[[torch.dtype], torch.dtype],
    ):
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{type(optimizer).__name__} steps with a closure that computes the loss again, and engine.step() has "
                "none: use an optimizer whose step() works on gradients alone"
            )
        self.optimizer = optimizer
        self._native = native
        self._names = trained.names
        self._whole = native.client_sees_whole()
        self._fragments: list[_Fragment] = []
        self._shards: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        replaced: dict[int, list[torch.Tensor]] = {id(p): [] for p in trained.tensors}
        for index, offset, length, gradient, master in _shards(native):
            self._fragments.append(_Fragment(index, offset, length))
            if self._whole:
                continue
            p = trained.tensors[index]
            tensor = torch.nn.Parameter(p.data.view(-1)[offset : offset + length] if master is None else master)
            self._shards.append((tensor, gradient))
            replaced[id(p)].append(tensor)
        if self._whole:
            for p in trained.tensors:
                in_place = dtype_for(p.dtype) == torch.float32
                master_of = p if in_place else torch.nn.Parameter(p.detach().float())
                self._pairs.append((p, master_of))
                replaced[id(p)].append(master_of)
        self._carry_state(trained)
        for group in optimizer.param_groups:
            group["params"] = [tensor for p in group["params"] for tensor in replaced.get(id(p), [p])]

    def _carry_state(self, trained: TrainedParameters) -> None:
        """State that the optimizer came with goes to the tensors that it works on from now on; all of it or nothing."""
        states = self.optimizer.state
        before = {index: states[p] for index, p in enumerate(trained.tensors) if states.get(p)}
        if not self._whole:
            for index, state in before.items():  # on all ranks, whatever their shards are
                check_sharding(state, trained.names[index], trained.tensors[index])
        carried: list[tuple[torch.Tensor, dict[str, Any]]] = []
        for position, fragment in enumerate([] if self._whole else self._fragments):
            if fragment.index in before:
                part = slice(fragment.offset, fragment.offset + fragment.length)
                state = part_of_state(before[fragment.index], trained.tensors[fragment.index], part)
                carried.append((self._tensor(position), state))
        for index, state in before.items() if self._whole else ():
            p, master = self._pairs[index]
            moved = state if p is master else part_of_state(state, p, None)
            carried.append((master, moved))
        for index in before:
            del states[trained.tensors[index]]
        states.update(carried)

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> _native.StepReport:
        """Ends a micro-batch; at a boundary the optimizer steps and everybody's weights follow."""
        if self._native.prepare():
            self._step_whole() if self._whole else self._step_shards()
        return self._native.finish(self.optimizer.param_groups)

    def _step_whole(self) -> None:
        gradients = [torch.empty_like(master) for _, master in self._pairs]
        self._native.gather_gradients(gradients)
        for (_, master), gradient in zip(self._pairs, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        for parameter, master in self._pairs:
            master.grad = None
            if master is not parameter:
                parameter.data.copy_(master.data)

    def _step_shards(self) -> None:
        self._native.scale_gradients()
        for tensor, gradient in self._shards:
            tensor.grad = gradient
        self.optimizer.step()
        for tensor, _ in self._shards:
            tensor.grad = None
        self._native.publish_client()

    # -- masters ---------------------------------------------------------------------------------------------------

    def refresh_masters(self) -> None:
        """The weights, as they are now, become the masters that live here; the native ones are refreshed apart."""
        with torch.no_grad():
            for parameter, master in self._pairs:
                if master is not parameter:
                    master.copy_(parameter)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_to_save(self) -> tuple[list[tuple[int, str, int, torch.Tensor]], Scalars]:
        """This rank's part of the state: slices (parameter, kind, offset, elements) and everything else."""
        if self._whole:
            self._native.load_masters([master for _, master in self._pairs])
        slices: list[tuple[int, str, int, torch.Tensor]] = []
        scalars: Scalars = {}
        for position, fragment in enumerate(self._fragments):
            tensor = self._tensor(position)
            for key, value in self.optimizer.state.get(tensor, {}).items():
                if _is_sliceable(key, value, tensor):
                    part = value.detach().contiguous().view(-1)
                    if self._whole:
                        part = part[fragment.offset : fragment.offset + fragment.length]
                    slices.append((fragment.index, key, fragment.offset, part.cpu()))
                else:
                    scalars.setdefault(self._names[fragment.index], {})[key] = value
        return slices, scalars

    def load_state(self, loaded: _native.LoadedCheckpoint, scalars: Scalars, kinds: list[str]) -> None:
        """Takes state and masters from a checkpoint, whatever the number of ranks that saved it."""
        tensors: list[tuple[str, int, torch.Tensor]] = []
        if self._whole:
            tensors = [(name, 0, master) for name, (_, master) in zip(self._names, self._pairs, strict=True)]
            for name, (parameter, master) in zip(self._names, self._pairs, strict=True):
                if master is not parameter:
                    _read(loaded, name, "master", 0, master.data)
        else:
            for position, fragment in enumerate(self._fragments):
                tensors.append((self._names[fragment.index], fragment.offset, self._tensor(position)))
        self.optimizer.state.clear()
        for name, offset, tensor in tensors:
            state = {key: value.clone() if isinstance(value, torch.Tensor) else value
                     for key, value in scalars.get(name, {}).items()}  # fmt: skip
            for kind in kinds:
                value = torch.zeros_like(tensor, requires_grad=False)
                if tensor.numel() > 0 and _read(loaded, name, kind, offset, value):
                    state[kind] = value
            if state:
                self.optimizer.state[tensor] = state
        # torch's own optimizers make of loaded values what they need: tensors of step counts that were numbers.
        self.optimizer.__setstate__({"state": self.optimizer.state})

    def _tensor(self, position: int) -> torch.Tensor:
        """What the optimizer works on where this rank's fragment is."""
        return self._pairs[self._fragments[position].index][1] if self._whole else self._shards[position][0]


def _is_sliceable(key: str, value: Any, tensor: torch.Tensor) -> bool:
    """Whether a checkpoint holds a value of the state as slices of the parameter."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return is_elementwise(key, value, tensor.shape) and value.dtype in floats


def _read(loaded: _native.LoadedCheckpoint, name: str, kind: str, offset: int, target: torch.Tensor) -> bool:
    """Reads into a tensor, wherever it is; whether that was saved."""
    here = target.cpu()  # the tensor itself, on a CPU
    found = loaded.read(name, kind, offset, here)
    if found and here is not target:
        target.copy_(here)
    return found


def _shards(native: _native.Engine) -> Iterator[tuple[int, int, int, torch.Tensor, torch.Tensor | None]]:
    """Per fragment of a parameter in this rank's shards: its index, first element and length, gradients and masters, or
    None where the parameter's own memory is the master."""
    for index, offset, length, gradient, master in native.client_shards():
        masters = None if master is None else _floats(master, length, native)
        yield index, offset, length, _floats(gradient, length, native), masters
    yield from native.client_tensors() or ()


def _floats(address: int, length: int, owner: _native.Engine) -> torch.Tensor:
    """fp32 memory of `owner`, which lives as long as the tensor."""
    memory = (ctypes.c_float * length).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]  # an array of ctypes takes any attribute
    return torch.frombuffer(memory, dtype=torch.float32)
