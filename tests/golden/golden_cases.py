"""The configurations of the golden recordings, by name."""

from golden_model import MICRO_BATCH

STEPS = 50
CLIENT = "client optimizer"

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10}}


def config(precision="fp32", stage=1, accumulation=1, clip=1.0, optimizer=ADAMW, scheduler=WARMUP, **more) -> dict:
    out = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000,
        **more,
    }
    if optimizer is not None:
        out["optimizer"] = optimizer
    if scheduler is not None:
        out["scheduler"] = scheduler
    if precision != "fp32":
        out[precision] = {"enabled": True}
    return out


def sharded(case: dict) -> dict:
    """`case` with settings under which this small model is really taken apart at stage 3."""
    small = {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_max_live_parameters": 50_000,
        "sub_group_size": 20_000,
    }
    return {**case, "zero_optimization": {**case["zero_optimization"], **small}}


def all_cases() -> dict[str, dict]:
    cases = {}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2):
            for accumulation in (1, 4):
                cases[f"{precision}-stage{stage}-accumulation{accumulation}"] = config(precision, stage, accumulation)

    for precision in ("fp32", "bf16"):
        for accumulation in (1, 4):
            case = config(precision, 3, accumulation)
            cases[f"{precision}-stage3-accumulation{accumulation}"] = sharded(case)
            cases[f"clip-off-{precision}-stage3-accumulation{accumulation}"] = sharded(
                {**case, "gradient_clipping": 0.0}
            )
        cases[f"clip-tight-{precision}-stage3"] = sharded(config(precision, 3, clip=0.1))

    schedules = {
        "warmup-linear": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 1e-5, "warmup_max_lr": 1e-3, "warmup_num_steps": 12, "warmup_type": "linear"},
        },
        "warmup-decay": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 40, "warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10},
        },
        "warmup-cosine": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 40, "warmup_min_ratio": 0.1, "warmup_num_steps": 8, "cos_min_ratio": 0.05},
        },
        "warmup-cosine-linear": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 60, "warmup_num_steps": 8, "warmup_type": "linear"},
        },
        "range-test": {
            "type": "LRRangeTest",
            "params": {"lr_range_test_min_lr": 1e-5, "lr_range_test_step_size": 10, "lr_range_test_step_rate": 5},
        },
        "range-test-staircase": {
            "type": "LRRangeTest",
            "params": {
                "lr_range_test_min_lr": 1e-5,
                "lr_range_test_step_size": 10,
                "lr_range_test_step_rate": 5,
                "lr_range_test_staircase": True,
            },
        },
        "one-cycle": {
            "type": "OneCycle",
            "params": {
                "cycle_min_lr": 1e-5,
                "cycle_max_lr": 1e-3,
                "cycle_first_step_size": 15,
                "cycle_second_step_size": 10,
                "decay_step_size": 5,
                "decay_lr_rate": 0.5,
            },
        },
        "one-cycle-stairs": {
            "type": "OneCycle",
            "params": {
                "cycle_min_lr": 1e-5,
                "cycle_max_lr": 1e-3,
                "cycle_first_step_size": 16,
                "cycle_first_stair_count": 4,
                "cycle_second_stair_count": 4,
                "cycle_min_mom": 0.85,
                "cycle_max_mom": 0.95,
                "decay_step_size": 6,
                "decay_mom_rate": 0.01,
            },
        },
    }
    for name, scheduler in schedules.items():
        cases[f"schedule-{name}"] = config(scheduler=scheduler)
    cases["schedule-none"] = config(scheduler=None)

    for stage in (0, 1, 2):
        cases[f"clip-off-fp32-stage{stage}"] = config(stage=stage, clip=0.0)
        cases[f"clip-tight-fp32-stage{stage}"] = config(stage=stage, clip=0.1)
    cases["clip-off-bf16-stage2"] = config("bf16", 2, clip=0.0)
    cases["clip-tight-bf16-stage1"] = config("bf16", 1, clip=0.1)

    cases["predivide-stage0"] = config(stage=0, gradient_predivide_factor=2.0)
    cases["prescale-stage0"] = config(stage=0, prescale_gradients=True, gradient_predivide_factor=2.0)
    cases["grad-accumulation-fp32-bf16-stage1"] = config(
        "bf16", 1, accumulation=4, data_types={"grad_accum_dtype": "fp32"}
    )

    optimizers = {
        "adam": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "adam-l2": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1, "adam_w_mode": False}},
        "adam-torch": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "adamw": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.2}},
        "lamb": {"type": "Lamb", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "lion": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.98], "weight_decay": 0.1}},
        "adagrad": {"type": "Adagrad", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "sgd": {"type": "SGD", "params": {"lr": 0.1}},
        "sgd-momentum": {
            "type": "SGD",
            "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        },
        "rmsprop-torch": {"type": "RMSprop", "params": {"lr": 1e-3}},
    }
    for name, optimizer in optimizers.items():
        for stage in (0, 1):
            cases[f"optimizer-{name}-stage{stage}"] = config(
                stage=stage, optimizer=optimizer, scheduler=None, zero_allow_untested_optimizer=True
            )

    # Optimizers that the client builds: (module, class, arguments), under the key that golden_worker.py takes out.
    clients = {
        "cpu-adam": ("deepspeed.ops.adam", "DeepSpeedCPUAdam", {"lr": 1e-3, "weight_decay": 0.1}),
        "cpu-adam-l2": (
            "deepspeed.ops.adam",
            "DeepSpeedCPUAdam",
            {"lr": 1e-3, "weight_decay": 0.1, "adamw_mode": False},
        ),
        "cpu-lion": ("deepspeed.ops.lion", "DeepSpeedCPULion", {"lr": 1e-4, "betas": (0.9, 0.98), "weight_decay": 0.1}),
        "cpu-adagrad": ("deepspeed.ops.adagrad", "DeepSpeedCPUAdagrad", {"lr": 1e-2, "weight_decay": 0.01}),
        "torch-adamw": ("torch.optim", "AdamW", {"lr": 1e-3, "weight_decay": 0.1}),
    }
    for name, client in clients.items():
        for stage in (0, 1, 2):
            cases[f"client-{name}-stage{stage}"] = {CLIENT: client, **config(stage=stage, optimizer=None)}
    return cases
