"""The optimizer that `deepspeed.initialize` returns: the client's or the config's, driven by the engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from deepspeed import _native
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.carried_state import refuse_state
from deepspeed.runtime.client_optimizer import ClientOptimizer
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
        engine: Any,
    ):
        self.optimizer = optimizer
        self._engine = weakref.ref(engine)
        self._native = native
        self._trained = trained
        self.overflow = False
        driven = getattr(optimizer, "ds_kind", None) is not None
        if driven:
            refuse_state(optimizer)
        self.client = None if driven else ClientOptimizer(optimizer, native, trained, dtype_for)

    def engine_step(self) -> _native.StepReport:
        """Called by `engine.step()`; see there."""
        report = self.client.step() if self.client else self._native.step(self.optimizer.param_groups)
        if report.applied:
            # torch's schedules warn when they are stepped before the optimizer, whose step() is not what runs here.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        if report.boundary:
            self.overflow = not report.applied
        return report

    def step(self, closure: Any = None) -> Any:
        """The same as `engine.step()`, for libraries that step the optimizer. Returns what `closure`, which is called
        first, returns."""
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the engine that drives this optimizer is gone")
        found = closure() if closure is not None else None
        engine.step()
        return found

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
        if self.client:
            self.client.refresh_masters()

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
        self._native = DESTROYED
        self.client = None


class _Destroyed:
    """What stands in the native engine's place after `engine.destroy()`."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"this engine was destroyed: {name} has nothing to work on; call deepspeed.initialize again")


DESTROYED: Any = _Destroyed()
