"""Adam on the CPU."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from deepspeed.ops.native_optimizer import NativeOptimizer


class DeepSpeedCPUAdam(NativeOptimizer):
    """Adam, with decoupled weight decay (AdamW) unless `adamw_mode` is False.

    lr, betas, eps, weight_decay, bias_correction   as in torch.optim.AdamW.
    amsgrad                must be False.
    fp32_optimizer_states  must be True: the moments are kept in fp32.
    """

    ds_kind = "Adam"

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ):
        super().__init__(
            model_params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "amsgrad": amsgrad,
                "adam_w_mode": adamw_mode,
                "fp32_optimizer_states": fp32_optimizer_states,
            },
        )
