"""What the native optimizers share: one native call updates all tensors of a parameter group."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from deepspeed import _native


class NativeOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose update is a native kernel, for float32, bfloat16 and float16 parameters on the CPU.

    State per parameter: `step` (updates so far, 0-d float32) and fp32 tensors of the parameter's shape. A 16-bit
    parameter is updated in fp32 and rounded back; with the engine it has an fp32 master instead.

    ds_kind  the optimizer's name to the engine, which runs the same kernels on its shards.
    """

    ds_kind: ClassVar[str]

    def __init__(self, params: ParamsT, hyperparameters: dict[str, Any]):
        defaults = _native.optimizer_defaults(self.ds_kind, hyperparameters)
        super().__init__(params, {**hyperparameters, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Torch wraps it so that the first call imports its compiler, which takes seconds and is not
        needed here: this calls what is wrapped."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = _native.optimizer_state_names(self.ds_kind, group)
            params = [param for param in group["params"] if param.grad is not None]
            states = [self._state_of(param, names) for param in params]
            self._update(group, names, params, [_dense(param.grad) for param in params], states)
        return loss

    def _update(
        self,
        group: dict[str, Any],
        names: list[str],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
    ) -> None:
        if not params:
            return
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        _native.optimizer_step(
            self.ds_kind,
            group,
            params,
            grads,
            [[state[name] for name in names] for state in states],
            [int(step) for step in steps],
            torch.get_num_threads(),
        )

    def _state_of(self, param: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in names:
                state[name] = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state stays fp32 whatever the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor) and value.dtype != self.state[param][name].dtype:
                    self.state[param][name] = value.to(device=param.device, dtype=torch.float32, copy=True)
        for state in self.state.values():
            # Optimizers of the original count in plain integers.
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32)


def _dense(grad: torch.Tensor) -> torch.Tensor:
    if grad.is_sparse:
        raise ValueError(
            "a gradient is sparse, these optimizers need dense ones: build the embedding with sparse=False"
        )
    return grad.contiguous()
