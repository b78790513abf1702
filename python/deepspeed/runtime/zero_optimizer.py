"""The optimizer that `deepspeed.initialize` returns: the client's or the config's, driven by the engine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.parameters import TrainedParameters


class DeepSpeedZeroOptimizer(ZeROOptimizer):
    """Presents an optimizer whose state the engine shards.

    optimizer     the basic optimizer; its `param_groups` are where learning rates and other options are read at
                  every step, so schedulers and clients change them there.
    overflow      whether the last boundary was skipped because a gradient was not finite.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        native: _native.Engine,
        trained: TrainedParameters,
        dtype_for: Callable[[torch.dtype], torch.dtype],
    ):
        self.optimizer = optimizer
        self._native = native
        self._trained = trained
        self.overflow = False
        driven = getattr(optimizer, "ds_kind", None) is not None
        self._client = None if driven else _ClientStep(optimizer, native, trained, dtype_for)

    def engine_step(self) -> _native.StepReport:
        """Called by `engine.step()`; see there."""
        report = self._client.step() if self._client else self._native.step(self.optimizer.param_groups)
        if report.boundary:
            self.overflow = not report.applied
        return report

    def step(self, closure: Any = None) -> None:
        """Not for the client: `engine.step()` knows about accumulation, loss scale and the schedule."""
        raise RuntimeError("call engine.step() instead of optimizer.step(): the engine drives this optimizer")

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """Not for the client: `engine.backward(loss)` takes the gradients, too."""
        raise RuntimeError("call engine.backward(loss) instead of optimizer.backward(loss)")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the current accumulation."""
        self._native.discard_gradients()
        for parameter in self._trained.tensors:
            parameter.grad = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The basic optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The basic optimizer's state; empty where the engine keeps it in shards."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The basic optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        """By what the loss is multiplied; 1 outside fp16."""
        return self._native.loss_scale()

    @property
    def cur_scale(self) -> float:
        """The same as `loss_scale`."""
        return self._native.loss_scale()

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts."""
        return self._native.dynamic_loss_scale()

    def override_loss_scale(self, loss_scale: float) -> None:
        """Fixes the loss scale at this value from now on."""
        self._native.override_loss_scale(loss_scale)

    def refresh_fp32_params(self) -> None:
        """Makes the model's weights, as they are now, the fp32 masters."""
        self._native.load_masters()

    def get_lr(self) -> float:
        """Learning rate of the first parameter group."""
        return self.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every parameter group."""
        for group in self.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Parameter groups, counters and loss scale. The sharded state itself is in checkpoints
        (`engine.save_checkpoint`)."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"param_groups": groups, "engine": self._native.state_json()}

    def load_state_dict(self, state_dict: dict[str, Any], **_options: Any) -> None:
        """Takes back what `state_dict` gave."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self._native.load_state_json(state_dict["engine"])

    def destroy(self) -> None:
        """Lets go of the engine's memory."""
        self._native = Destroyed()
        self._client = None


class Destroyed:
    """What stands in the native engine's place after `engine.destroy()`."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"this engine was destroyed: {name} has nothing to work on; call deepspeed.initialize again")


class _ClientStep:
    """Runs a torch optimizer on the masters: on whole parameters at stage 0, on this rank's shards above."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        native: _native.Engine,
        trained: TrainedParameters,
        dtype_for: Callable[[torch.dtype], torch.dtype],
    ):
        self.optimizer = optimizer
        self._native = native
        self._whole = native.client_sees_whole()
        if self._whole:
            in_place = [dtype_for(p.dtype) == torch.float32 for p in trained.tensors]
            self._pairs = [
                (p, p if same else torch.nn.Parameter(p.detach().float()))
                for p, same in zip(trained.tensors, in_place, strict=True)
            ]
            replaced = {id(p): [master] for p, master in self._pairs}
        else:
            replaced = {id(p): [] for p in trained.tensors}
            self._shards: list[tuple[torch.Tensor, torch.Tensor]] = []
            for index, offset, length, gradient, master in native.client_shards():
                p = trained.tensors[index]
                weights = p.data.view(-1)[offset : offset + length] if master is None else _floats(master, length, native)
                tensor = torch.nn.Parameter(weights)
                self._shards.append((tensor, _floats(gradient, length, native)))
                replaced[id(p)].append(tensor)
        for group in optimizer.param_groups:
            group["params"] = [tensor for p in group["params"] for tensor in replaced.get(id(p), [p])]

    def step(self) -> _native.StepReport:
        if self._native.prepare():
            self._step_whole() if self._whole else self._step_shards()
        return self._native.finish(self.optimizer.param_groups)

    def _step_whole(self) -> None:
        masters = [master for _, master in self._pairs]
        for master in masters:
            master.grad = torch.empty_like(master)
        self._native.gather_gradients([master.grad for master in masters])
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


def _floats(address: int, length: int, owner: _native.Engine) -> torch.Tensor:
    """fp32 memory of `owner`, which lives as long as the tensor."""
    memory = (ctypes.c_float * length).from_address(address)
    memory.owner = owner
    return torch.frombuffer(memory, dtype=torch.float32)
