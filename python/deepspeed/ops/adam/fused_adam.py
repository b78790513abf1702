"""Adam in one pass per group: native on the CPU, torch's fused kernel on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from deepspeed.ops.native_optimizer import NativeOptimizer


class FusedAdam(NativeOptimizer):
    """Adam, with decoupled weight decay (AdamW) unless `adam_w_mode` is False.

    lr, betas, eps, weight_decay, bias_correction   as in torch.optim.AdamW.
    amsgrad        must be False.
    set_grad_none  must be True: `zero_grad()` releases gradients.
    """

    ds_kind = "Adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "amsgrad": amsgrad,
                "adam_w_mode": adam_w_mode,
                "set_grad_none": set_grad_none,
            },
        )

    def _update(
        self,
        group: dict[str, Any],
        names: list[str],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
    ) -> None:
        if not params or not params[0].is_cuda:
            super()._update(group, names, params, grads, states)
            return
        if not group["bias_correction"]:
            raise ValueError("FusedAdam on a device needs bias_correction=True: torch's fused kernel has no other form")
        for param, state in zip(params, states, strict=True):
            state["step"] = state["step"].to(param.device)
        adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=group["adam_w_mode"],
        )
