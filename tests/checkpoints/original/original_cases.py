"""The configurations of the recorded checkpoints, by name."""

from __future__ import annotations

from typing import Any

ADAMW = {"type": "AdamW", "params": {"lr": 5e-3, "betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True}}
FUSED = {"type": "AdamW", "params": {"lr": 5e-3, "betas": [0.9, 0.95], "eps": 1e-8}}
SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 20, "warmup_min_lr": 0, "warmup_max_lr": 5e-3, "warmup_num_steps": 2},
}
FP16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 2, "min_loss_scale": 1}


def config(precision: str, stage: int, optimizer: Any = ADAMW, zero: Any = None, **more: Any) -> dict[str, Any]:
    out = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
        **({"optimizer": optimizer} if optimizer else {}),
        "scheduler": SCHEDULE,
        **more,
    }
    if precision == "fp16":
        out["fp16"] = FP16
    elif precision == "bf16":
        out["bf16"] = {"enabled": True}
    return out


def all_cases() -> dict[str, dict[str, Any]]:
    """name -> {"world", "config"}; "universal" makes the converted checkpoint, too; "client" is an optimizer that the
    script builds: (module, class, arguments)."""
    cases: dict[str, dict[str, Any]] = {}

    def case(name: str, world: int, settings: dict[str, Any], **more: Any) -> None:
        cases[name] = {"world": world, "config": settings, **more}

    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            universal = stage in (2, 3)
            case(f"{precision}-stage{stage}-world2", 2, config(precision, stage), universal=universal)
            case(f"{precision}-stage{stage}-world1", 1, config(precision, stage))
    for stage in (1, 2, 3):
        case(f"fp16-stage{stage}-world2", 2, config("fp16", stage))
    case("bf16-optimizer-world2", 2, config("bf16", 1, data_types={"grad_accum_dtype": "fp32"}))
    case("bf16-stage0-fused-world2", 2, config("bf16", 0, FUSED))
    case("fp32-stage0-fused-world1", 1, config("fp32", 0, FUSED))
    case("fp32-stage2-accumulation-world2", 2, config("fp32", 2, gradient_accumulation_steps=2))
    case("bf16-stage3-subgroups-world2", 2, config("bf16", 3, zero={"sub_group_size": 30}))
    case("bf16-stage2-round-robin-world2", 2, config("bf16", 2, zero={"round_robin_gradients": True}))
    case("bf16-stage2-alignment-world2", 2, config("bf16", 2, zero={"parameter_alignment": True}))
    case("fp32-stage1-elastic-world2", 2, config("fp32", 1, zero={"elastic_checkpoint": True}))
    adagrad = ("deepspeed.ops.adagrad", "DeepSpeedCPUAdagrad", {"lr": 1e-2})
    case("fp32-stage1-client-adagrad-world2", 2, config("fp32", 1, None), client=adagrad)
    adamw = ("torch.optim", "AdamW", {"lr": 5e-3, "betas": (0.9, 0.95)})
    case("bf16-stage2-client-adamw-world2", 2, config("bf16", 2, None), client=adamw)
    momentum = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
    case("bf16-stage2-sgd-world2", 2, config("bf16", 2, momentum))
    rmsprop = {"type": "RMSprop", "params": {"lr": 1e-3}}
    case("fp32-stage1-rmsprop-world2", 2, config("fp32", 1, rmsprop))
    return cases


def client_state(rank: int) -> dict[str, Any]:
    import torch

    return {
        "epoch": 3,
        "note": ["text", (1, 2.5, None, True)],
        "best": {"loss": 1.25, 7: b"bytes"},
        "big": 1 << 80,
        "moving": torch.arange(6, dtype=torch.float64).view(2, 3).t(),
        "rank": rank,
    }
