"""Lamb (You et al., 2020): Adam's direction, scaled per parameter by a trust ratio."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from deepspeed.ops.native_optimizer import NativeOptimizer


class FusedLamb(NativeOptimizer):
    """Lamb.

    lr, bias_correction, betas, eps, weight_decay   as in Adam.
    max_coeff, min_coeff     limits of the trust ratio.
    max_grad_norm            must be 0: clipping is the config's `gradient_clipping`.
    eps_inside_sqrt, amsgrad must be False.
    """

    ds_kind = "Lamb"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ):
        hyperparameters = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "amsgrad": amsgrad,
        }
        if max_grad_norm != 0:
            hyperparameters["max_grad_norm"] = max_grad_norm
        super().__init__(params, hyperparameters)
