"""Runs of the libraries' own scripts: what is started with which arguments and which DeepSpeed config, on how many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS = 8
COMMON = [
    "--output_dir=out", "--do_train", "--do_eval", "--use_cpu", "--report_to=none", "--disable_tqdm=true",
    "--per_device_train_batch_size=4", "--num_train_epochs=2", "--learning_rate=2e-3", "--warmup_steps=2",
    "--weight_decay=0.01", "--logging_steps=1", "--save_strategy=no", "--seed=7", "--dataloader_pin_memory=false",
]  # fmt: skip
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
WARMUP = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto",
    },
}  # fmt: skip
# What transformers' documentation shows for each stage.
ZERO: dict[int, dict[str, Any]] = {
    0: {"stage": 0},
    1: {"stage": 1},
    2: {
        "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
        "reduce_scatter": True, "reduce_bucket_size": "auto", "contiguous_gradients": True,
        "round_robin_gradients": False,
    },
    3: {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip


# What ranks find imported: it takes most of a short run.
PRELOAD = (
    "tiny_models", "accelerate", "peft", "lightning.pytorch", "lightning.fabric", "transformers.trainer_seq2seq",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("gpt2", "llama", "bert", "vit", "t5")),
)  # fmt: skip


@dataclass
class Case:
    """One run. `config` is None where the script makes its own."""

    script: str
    arguments: list[str]
    config: dict[str, Any] | None = None
    world: int = 2
    precision: str = "fp32"


def ds_config(stage: int, optimizer: Any = ADAMW, scheduler: Any = WARMUP, **more: Any) -> dict[str, Any]:
    """A config full of "auto"."""
    zero = {**ZERO[stage], **more.pop("zero", {})}
    config: dict[str, Any] = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
        **more,
    }
    if optimizer is not None:
        config["optimizer"] = optimizer
    if scheduler is not None:
        config["scheduler"] = scheduler
    return config


def trainer(model: str, config: dict[str, Any], *more: str, **options: Any) -> Case:
    """The Trainer on `model`."""
    arguments = [*COMMON, "--deepspeed=ds_config.json", f"--model={model}", *more]
    return Case("run_trainer.py", arguments, config, **options)


def accelerated(*arguments: str, **options: Any) -> Case:
    """accelerate's loop."""
    return Case("run_accelerate.py", ["--output_dir=out", *arguments], **options)


# What accelerate's documentation shows: it fills in fewer settings than the Trainer.
ACCELERATE_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
ACCELERATE_WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
CPU = {"device": "cpu", "pin_memory": False}

CASES: dict[str, Case] = {
    **{f"trainer-gpt2-stage{stage}": trainer("gpt2", ds_config(stage)) for stage in (0, 1, 2, 3)},
    "trainer-gpt2-stage2-alone": trainer("gpt2", ds_config(2), world=1),
    "trainer-llama-stage3-four": trainer("llama", ds_config(3), "--examples=64", world=4),
    "trainer-llama-stage2-accumulation": trainer("llama", ds_config(2), "--gradient_accumulation_steps=2"),
    "trainer-llama-stage1-bf16": trainer("llama", ds_config(1), "--bf16", precision="bf16"),
    "trainer-gpt2-stage3-bf16": trainer("gpt2", ds_config(3), "--bf16", precision="bf16"),
    "trainer-bert-stage3": trainer("bert", ds_config(3)),
    "trainer-vit-stage2": trainer("vit", ds_config(2)),
    "trainer-t5-stage2": trainer("t5", ds_config(2), "--predict_with_generate"),
    "trainer-t5-stage3": trainer("t5", ds_config(3), "--predict_with_generate"),
    # Whose optimizer, whose schedule: both of the config above.
    "trainer-hf-optimizer-hf-schedule": trainer("gpt2", ds_config(2, None, None)),
    "trainer-hf-optimizer-ds-schedule": trainer("gpt2", ds_config(2, None)),
    "trainer-ds-optimizer-hf-schedule": trainer("gpt2", ds_config(2, scheduler=None)),
    "trainer-hf-optimizer-hf-schedule-stage3": trainer("gpt2", ds_config(3, None, None)),
    "trainer-gpt2-stage2-offload": trainer("gpt2", ds_config(2, zero={"offload_optimizer": CPU})),
    "trainer-gpt2-stage3-offload": trainer("gpt2", ds_config(3, zero={"offload_optimizer": CPU, "offload_param": CPU})),
    "trainer-lora-stage2": trainer("gpt2", ds_config(2), "--lora"),
    "trainer-lora-stage3": trainer("llama", ds_config(3), "--lora"),
    "trainer-frozen-stage3": trainer("gpt2", ds_config(3), "--freeze=wte"),
    "accelerate-stage1-accumulate": accelerated("--zero_stage=1", "--gradient_accumulation_steps=2"),
    "accelerate-stage2": accelerated("--zero_stage=2", "--model=bert"),
    "accelerate-stage3-accumulate": accelerated("--zero_stage=3", "--gradient_accumulation_steps=2"),
    "accelerate-stage2-cpu-optimizer": accelerated("--zero_stage=2", "--offload=cpu"),
    "accelerate-config": accelerated(
        "--ds_config=ds_config.json", config=ds_config(2, ACCELERATE_ADAMW, ACCELERATE_WARMUP)
    ),
    "accelerate-config-hf-schedule": accelerated(
        "--ds_config=ds_config.json", config=ds_config(3, ACCELERATE_ADAMW, None)
    ),
}


def lightning(script: str, strategy: str, *more: str, **options: Any) -> Case:
    """Lightning's Trainer or Fabric with one of its strategies."""
    arguments = [f"--strategy={strategy}", f"--devices={options.get('world', 2)}", *more]
    return Case(script, arguments, **options)


CASES |= {
    "lightning-stage1-accumulate": lightning("run_lightning.py", "deepspeed_stage_1", "--accumulate=2"),
    "lightning-stage2": lightning("run_lightning.py", "deepspeed_stage_2"),
    "lightning-stage2-offload": lightning("run_lightning.py", "deepspeed_stage_2_offload"),
    "lightning-stage3-bf16": lightning(
        "run_lightning.py", "deepspeed_stage_3", "--precision=bf16-true", precision="bf16"
    ),
    "lightning-stage3-offload": lightning("run_lightning.py", "deepspeed_stage_3_offload"),
    "fabric-deepspeed": lightning("run_fabric.py", "deepspeed"),
    "fabric-stage3": lightning("run_fabric.py", "deepspeed_stage_3"),
}
