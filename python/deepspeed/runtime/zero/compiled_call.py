"""A module whose weights are gathered, compiled: gathering is around what torch.compile sees, never in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed.runtime.zero.gather_hooks import GatherHooks


class CompiledCall:
    """Stands in for a module's call, in the place where `torch.nn.Module.compile` puts its own; copies of the module lack it.

    Everything below the module is whole while it runs, so its parameters are read there without being watched.
    """

    def __init__(
        self, hooks: GatherHooks, module: torch.nn.Module, number: int, gathers: bool, options: dict[str, Any]
    ):
        self._hooks, self._module, self._number, self._gathers = hooks, module, number, gathers
        self._run = torch.compile(module._call_impl, **options)
        # Parameters of the modules that watch them. The same dicts at each call: compiled code is guarded by what it has seen.
        self._plain = [(m, dict(m._parameters)) for m in module.modules() if type(m._parameters) is not dict]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._hooks.before(self._number, self._gathers, self._module, args, kwargs)
        watched = [m._parameters for m, _ in self._plain]
        for m, plain in self._plain:
            m.__dict__["_parameters"] = plain
        output = None
        try:
            output = self._run(*args, **kwargs)
        finally:
            for (m, _), parameters in zip(self._plain, watched, strict=True):
                m.__dict__["_parameters"] = parameters
            self._hooks.after(self._number, self._gathers, self._module, args, kwargs, output)
        return output
