"""Lion (Chen et al., 2023): the sign of a mix of gradient and momentum, with decoupled weight decay."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from deepspeed.ops.native_optimizer import NativeOptimizer


class DeepSpeedCPULion(NativeOptimizer):
    """Lion on the CPU.

    betas                  weight of the momentum in the direction, and its decay.
    weight_decay           decoupled.
    fp32_optimizer_states  must be True: the momentum is kept in fp32.
    """

    ds_kind = "Lion"

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ):
        super().__init__(
            model_params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "fp32_optimizer_states": fp32_optimizer_states,
            },
        )


class FusedLion(NativeOptimizer):
    """Lion in one pass per group.

    betas          weight of the momentum in the direction, and its decay.
    weight_decay   decoupled.
    set_grad_none  must be True: `zero_grad()` releases gradients.
    """

    ds_kind = "Lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "set_grad_none": set_grad_none}
        )
