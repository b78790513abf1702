"""The ways to keep the model state that the tests compare, and the training loop that reports every bit of a run."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from models import Case, build

# Small enough that every model here has several units, several buckets and nothing that stays whole for being small.
_SMALL = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 500,
    "stage3_max_live_parameters": 3000,
    "stage3_max_reuse_distance": 3000,
    "reduce_bucket_size": 700,
    "sub_group_size": 900,
}
_CPU = {"device": "cpu"}

# zero_optimization by name. {folder} stands for a folder of the test's own. Buckets are the same everywhere: the sum of
# squares that is the norm goes bucket by bucket.
BLOCKS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0, "reduce_bucket_size": 700},
    "1": {"stage": 1, "reduce_bucket_size": 700},
    "2": {"stage": 2, "reduce_bucket_size": 700},
    "3": _SMALL,
    "3 defaults": {"stage": 3, "reduce_bucket_size": 700},
    "2 optimizer on cpu": {"stage": 2, "reduce_bucket_size": 700, "offload_optimizer": _CPU},
    "3 optimizer on cpu": {**_SMALL, "offload_optimizer": _CPU},
    "3 all on cpu": {**_SMALL, "offload_optimizer": _CPU, "offload_param": _CPU},
    "3 half of the optimizer on cpu": {**_SMALL, "offload_optimizer": {**_CPU, "ratio": 0.5}},
    "3 optimizer on nvme": {**_SMALL, "offload_optimizer": {"device": "nvme", "nvme_path": "{folder}"}},
    "3 all on nvme": {
        **_SMALL,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": "{folder}",
            "pipeline_read": True,
            "pipeline_write": True,
        },
        "offload_param": {"device": "nvme", "nvme_path": "{folder}", "buffer_size": 5000, "max_in_cpu": 2000},
    },
}

# What is compared. The first is the reference.
VARIANTS = tuple(BLOCKS)

# What differs from others only where a device has the optimizer's state.
BLOCKS |= {
    "3 weights on cpu": {**_SMALL, "offload_param": _CPU},
    "3 weights on nvme": {**_SMALL, "offload_param": {"device": "nvme", "nvme_path": "{folder}", "max_in_cpu": 500}},
}

STAGE_3 = tuple(name for name in VARIANTS if BLOCKS[name]["stage"] == 3)
PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}}
SGD = {"type": "SGD", "params": {"lr": 0.1}}


def config(variant: str, precision: str = "fp32", folder: Any = "", **more: Any) -> dict[str, Any]:
    """A config of `variant`; keys of `more` are added or, where None, removed. `folder` is where NVMe files go."""

    def placed(block: dict[str, Any]) -> dict[str, Any]:
        return {
            key: placed(value) if isinstance(value, dict) else str(folder) if value == "{folder}" else value
            for key, value in block.items()
        }

    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": ADAMW,
        "gradient_clipping": 0.7,
        "zero_optimization": placed(BLOCKS[variant]),
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
        **(
            {"fp16": {"enabled": True, "initial_scale_power": 7, "loss_scale_window": 2}} if precision == "fp16" else {}
        ),
        **more,
    }
    return {key: value for key, value in out.items() if value is not None}


def start(settings: dict[str, Any], model: nn.Module, **arguments: Any) -> Any:
    """The engine of `deepspeed.initialize`."""
    import deepspeed

    torch.set_num_threads(1)
    return deepspeed.initialize(model=model, config=settings, **arguments)[0]


def micro_step(engine: Any, case: Case, index: int, dtype: torch.dtype, rank: int | None = None) -> float:
    """One forward, backward and step; the same random numbers in every run. `rank` chooses another rank's batch."""
    rank = engine.global_rank if rank is None else rank
    torch.manual_seed(1000 * index + rank)
    arguments, keywords = case.batch(rank, index, dtype)
    loss = case.loss(engine(*arguments, **keywords))
    engine.backward(loss)
    engine.step()
    return loss.item()


def train(case: Case, variant: str, precision: str, folder: Any = "", steps: int = 4, **more: Any) -> dict[str, Any]:
    """Losses of this rank, norms, final weights and this rank's buffers of `steps` micro-steps."""
    engine = start(config(variant, precision, folder, **more), build(case))
    before = digest(engine.module)
    losses, norms = [], []
    for index in range(steps):
        passed = engine.global_steps
        losses.append(micro_step(engine, case, index, DTYPES[precision]))
        if engine.global_steps > passed:
            norms.append(engine.get_global_grad_norm())
    after = digest(engine.module)
    found = {"losses": losses, "norms": norms, "skipped": engine.skipped_steps, "weights": after}
    found |= {"moved": before != after, "buffers": _digest(dict(engine.module.named_buffers()))}
    engine.destroy()
    return found


def whole(module: nn.Module) -> Any:
    """A context in which every parameter of `module` is whole."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


def digest(module: nn.Module) -> str:
    """One number for every bit of the parameters."""
    with whole(module):
        return _digest(dict(module.named_parameters(remove_duplicate=False)))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {tuple(tensor.shape)}".encode() + data)
    return total.hexdigest()


def values(module: nn.Module) -> torch.Tensor:
    """All weights as one fp64 vector, for comparisons that allow rounding."""
    with whole(module):
        return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert one.shape == other.shape
    return ((one - other).abs().max() / other.abs().max()).item()
