"""Records goldens.json: what the original's schedules and torch's optimizers compute.

Run with a Python that has deepspeed 0.19.8 and torch; goldens.json is written beside this file.
"""

import json
from pathlib import Path

import torch

from deepspeed.runtime import lr_schedules

BASE_LRS = [0.3, 0.05]
ITERATIONS = 40

SCHEDULES = [
    ("WarmupLR", {}),
    ("WarmupLR", {"warmup_num_steps": 10}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_max_lr": 0.02}),
    ("WarmupLR", {"warmup_num_steps": 7, "warmup_min_lr": [0.001, 0.002], "warmup_max_lr": [0.1, 0.2]}),
    ("WarmupLR", {"warmup_num_steps": 10, "warmup_min_lr": 0.1, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 30, "warmup_num_steps": 10}),
    ("WarmupDecayLR", {"total_num_steps": 30, "warmup_num_steps": 10, "warmup_max_lr": None}),
    ("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 10, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 30, "warmup_num_steps": 10}),
    (
        "WarmupCosineLR",
        {
            "total_num_steps": 25,
            "warmup_num_steps": 5,
            "warmup_min_ratio": 0.1,
            "cos_min_ratio": 0.05,
            "warmup_type": "linear",
        },
    ),
    ("WarmupCosineLR", {"total_num_steps": 5, "warmup_num_steps": 10}),
    ("LRRangeTest", {"lr_range_test_step_size": 8}),
    (
        "LRRangeTest",
        {
            "lr_range_test_min_lr": [0.1, 0.2],
            "lr_range_test_step_size": 7,
            "lr_range_test_step_rate": 2.5,
            "lr_range_test_staircase": True,
        },
    ),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5}),
    (
        "OneCycle",
        {
            "cycle_min_lr": [0.1, 0.2],
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 7,
            "cycle_second_step_size": 12,
            "decay_step_size": 3,
            "decay_lr_rate": 0.2,
            "decay_mom_rate": 0.05,
            "cycle_min_mom": 0.7,
            "cycle_max_mom": [0.9, 0.95],
        },
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 10,
            "cycle_first_stair_count": 3,
            "cycle_second_stair_count": 4,
            "cycle_momentum": False,
        },
    ),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 6, "cycle_second_step_size": 0}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 9,
            "cycle_second_step_size": 6,
            "cycle_first_stair_count": 3,
            "decay_step_size": 5,
            "decay_mom_rate": 0.1,
        },
    ),
]

OPTIMIZERS = [
    ("AdamW", {"torch_adam": True}, torch.optim.AdamW, {}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.95]}, torch.optim.AdamW, None),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "adam_w_mode": False, "eps": 1e-3}, torch.optim.Adam, None),
    ("SGD", {"lr": 0.1}, torch.optim.SGD, None),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}, torch.optim.SGD, None),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, torch.optim.SGD, None),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.01}, torch.optim.Adagrad, None),
]
STEPS = 6


def schedule(name, params):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in BASE_LRS]
    optimizer = torch.optim.Adam(groups)
    scheduler = getattr(lr_schedules, name)(optimizer, **params)
    values = []
    for _ in range(-1, ITERATIONS):
        groups = optimizer.param_groups
        values.append([[group["lr"] for group in groups], [list(group["betas"]) for group in groups]])
        scheduler.step()
    lrs, betas = zip(*values, strict=True)
    cycles = name == "OneCycle" and params.get("cycle_momentum", True)
    return {"name": name, "params": params, "lr": lrs, "betas": betas if cycles else None}


def optimize(name, params, cls, torch_params):
    if torch_params is None:
        torch_params = {key: value for key, value in params.items() if key != "adam_w_mode"}
    generator = torch.Generator().manual_seed(1)
    param = torch.nn.Parameter(torch.randn(5, generator=generator))
    grads = torch.randn(STEPS, 5, generator=generator)
    start = param.tolist()
    optimizer = cls([param], foreach=False, **torch_params)
    steps = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        steps.append(param.tolist())
    return {"name": name, "params": params, "start": start, "grads": grads.tolist(), "steps": steps}


goldens = {
    "base_lrs": BASE_LRS,
    "schedules": [schedule(*case) for case in SCHEDULES],
    "optimizers": [optimize(*case) for case in OPTIMIZERS],
}
Path(__file__).with_name("goldens.json").write_text(json.dumps(goldens) + "\n")
