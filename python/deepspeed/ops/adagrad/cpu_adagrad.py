"""Adagrad on the CPU."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from deepspeed.ops.native_optimizer import NativeOptimizer


class DeepSpeedCPUAdagrad(NativeOptimizer):
    """Adagrad, with L2 weight decay.

    lr, eps, weight_decay, lr_decay  as in torch.optim.Adagrad.
    amsgrad                must be False.
    fp32_optimizer_states  must be True: the sum of squares is kept in fp32.
    """

    ds_kind = "Adagrad"

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        lr_decay: float = 0.0,
    ):
        super().__init__(
            model_params,
            {
                "lr": lr,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "fp32_optimizer_states": fp32_optimizer_states,
                "lr_decay": lr_decay,
            },
        )
