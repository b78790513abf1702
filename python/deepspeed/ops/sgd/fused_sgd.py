"""SGD on the CPU; what the config's `"type": "SGD"` becomes."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from deepspeed.ops.native_optimizer import NativeOptimizer


class FusedSGD(NativeOptimizer):
    """Stochastic gradient descent; all arguments as in torch.optim.SGD."""

    ds_kind = "SGD"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
        )
