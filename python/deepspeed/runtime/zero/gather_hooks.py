"""Stage 3 where ranks share no memory: hooks that tell the native engine which module runs, so that its weights are whole.

What is gathered and released when is decided in Rust (`_native.Gathering`); here is what torch lets only Python see.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.parameters import grad_tensors, tensors_in
from deepspeed.runtime.zero.compiled_call import CompiledCall
from deepspeed.runtime.zero.sharded_parameter import ZeroParamStatus
from deepspeed.utils.z3_leaf_module import z3_leaf_module

_NO_TASK = -1


class GatherHooks:
    """Hooks on the modules that gather units, and on the reading of every sharded parameter.

    native   which units are whole.
    numbers  by id of a parameter, its number there.
    """

    _copied = False

    def __init__(self, engine: _native.Engine, module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]):
        self.numbers = {id(p): number for number, p in enumerate(parameters)}
        tree = list(module.named_modules())
        self.native = _native.Gathering(
            engine,
            parameters,
            [(path, _is_callable(m), z3_leaf_module(m), self._own(m)) for path, m in tree],
            (ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE),
        )
        self._units = self.native.param_units()
        self._calls: list[_Call] = []
        # Modules with hooks: number, whether it gathers, the handles of the hooks.
        self._hooked: dict[torch.nn.Module, tuple[int, bool, list[torch.utils.hooks.RemovableHandle]]] = {}
        self._modules = [m for _, m in tree]
        for index, number, gathers in self.native.modules():
            self._hook(tree[index][1], number, gathers)
        for _, owner in tree:
            if self._own(owner):
                owner.__dict__["_parameters"] = _Parameters(owner._parameters, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied_hooks, ()

    def _own(self, module: torch.nn.Module) -> list[int]:
        return [self.numbers[id(p)] for p in module._parameters.values() if id(p) in self.numbers]

    def unit_of(self, parameter: torch.Tensor) -> int | None:
        """The unit of a sharded parameter that has elements."""
        number = self.numbers.get(id(parameter))
        return None if number is None else self._units[number]

    def _hook(self, module: torch.nn.Module, number: int, gathers: bool) -> None:
        before, after = partial(self.before, number, gathers), partial(self.after, number, gathers)
        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            # Recomputation of activations ends with an exception.
            module.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        self._hooked[module] = (number, gathers, handles)

    def compile(self, options: dict[str, Any]) -> None:
        """Compiles what is between two gatherings: the modules with hooks and none below them. `options` are those of
        torch.compile."""
        for module, (number, gathers, handles) in self._hooked.items():
            below = list(module.modules())[1:]
            if any(it in self._hooked for it in below):
                continue
            for handle in handles:
                handle.remove()
            module._compiled_call_impl = CompiledCall(self, module, number, gathers, options)

    def before(self, number: int, gathers: bool, _module: Any, args: Any, kwargs: Any) -> None:
        """The forward of a module begins."""
        if self._copied:
            return
        grad = torch.is_grad_enabled()
        if gathers:
            self.native.enter(number, grad, in_backward())
        inputs = []
        if grad:
            inputs = [t for t in grad_tensors((args, kwargs)) if not isinstance(t, torch.nn.Parameter)]
        call = _Call(self.native, number, bool(inputs))
        if len(inputs) == 1:
            inputs[0].register_hook(call.end)
        elif inputs:
            torch.autograd.graph.register_multi_grad_hook(inputs, call.end)
        self._calls.append(call)

    def after(self, number: int, gathers: bool, _module: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        """The forward of a module is over, or was given up."""
        if all(call.number != number for call in self._calls):
            return  # its beginning failed, or the module is a copy
        while (call := self._calls.pop()).number != number:
            pass
        grad, hidden, parameters = torch.is_grad_enabled(), False, []
        if grad:
            tensors = list(tensors_in(output))
            hidden = not tensors
            for tensor in tensors:
                if isinstance(tensor, torch.nn.Parameter):
                    parameters.append(tensor)
                elif tensor.requires_grad:
                    tensor.register_hook(call.begin)
        if gathers:
            self.native.leave(number, grad, in_backward(), hidden)
        for parameter in parameters:
            unit = self.unit_of(parameter)
            if unit is not None:
                self.read(unit)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is compiled may read another module's parameter
    def read(self, unit: int) -> None:
        """A parameter of `unit` is read: by a module that gathers it, by another, or by the program, which gets what is
        there."""
        if self.native.is_active(unit):
            return
        backward = in_backward()
        if backward or self.native.is_running() or _in_a_call():
            self.native.borrow(unit, torch.is_grad_enabled(), backward)

    def remove(self) -> None:
        """Takes all hooks away."""
        for module, (_, _, handles) in self._hooked.items():
            for handle in handles:
                handle.remove()
            if isinstance(module._compiled_call_impl, CompiledCall):
                module._compiled_call_impl = None
        for module in self._modules:
            if isinstance(module._parameters, _Parameters):
                module.__dict__["_parameters"] = dict(module._parameters)
        self._hooked, self._modules = {}, []


def _copied_hooks() -> GatherHooks:
    """The hooks of a copied or unpickled module, whose parameters are those it was copied with."""
    hooks = GatherHooks.__new__(GatherHooks)
    hooks._copied, hooks._calls = True, []
    return hooks


class _Call:
    """A call of a module, whose backward may come: once, or once per graph task that runs it."""

    __slots__ = ("native", "number", "task", "ticket", "visible")

    def __init__(self, native: _native.Gathering, number: int, visible: bool):
        self.native, self.number, self.visible = native, number, visible
        self.task, self.ticket = _NO_TASK, 0

    def begin(self, _gradient: torch.Tensor) -> None:
        """A gradient of an output is there: the first in this pass begins the backward."""
        task = torch._C._current_graph_task_id()
        if self.task != task:
            self.task = task
            self.ticket = self.native.enter_backward(self.number, self.visible)

    def end(self, _gradients: Any) -> None:
        """The gradients of all inputs are there."""
        if self.task == torch._C._current_graph_task_id():
            self.task = _NO_TASK
            self.native.leave_backward(self.ticket)


class _Parameters(dict[str, Any]):
    """A module's own parameters: reading one that is not whole gathers it."""

    def __init__(self, parameters: dict[str, Any], hooks: GatherHooks):
        super().__init__(parameters)
        self._hooks = weakref.ref(hooks)
        self._units = {name: unit for name, p in parameters.items() if (unit := hooks.unit_of(p)) is not None}

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        unit = self._units.get(name)
        if unit is not None and (hooks := self._hooks()) is not None:
            hooks.read(unit)
        return parameter

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def in_backward() -> bool:
    """Whether autograd runs on this thread."""
    return bool(torch._C._current_graph_task_id() != _NO_TASK)


def _in_a_call() -> bool:
    """Whether a module is being called, though none that gathers: a part of one, by itself."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not torch.nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame is not None


def _is_callable(module: torch.nn.Module) -> bool:
    """Whether the module has a forward, which containers of modules do not."""
    return "forward" in vars(module) or type(module).forward is not torch.nn.Module.forward
