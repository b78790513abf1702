"""The training run time: engine, configuration, schedules, data loading."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    submodules=(
        "activation_checkpointing",
        "arguments",
        "base_optimizer",
        "config",
        "dataloader",
        "engine",
        "fp16",
        "lr_schedules",
        "utils",
        "zero",
        "zero_optimizer",
    ),
    attributes={
        "ZeROOptimizer": "deepspeed.runtime.base_optimizer",
        "DeepSpeedOptimizer": "deepspeed.runtime.base_optimizer",
    },
)
