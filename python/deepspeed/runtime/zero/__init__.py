"""`deepspeed.zero`: construction and gathering of sharded parameters."""

from deepspeed._lazy import attach
from deepspeed.runtime.zero.partition_parameters import (
    GatheredParameters,
    Init,
    ZeroParamStatus,
    ZeroParamType,
    register_external_parameter,
    unregister_external_parameter,
)

__getattr__, __dir__ = attach(
    __name__,
    submodules=("config", "partition_parameters", "stage3", "stage_1_and_2"),
    attributes={
        "TiledLinear": "deepspeed.runtime.zero.partition_parameters",
        "TiledLinearReturnBias": "deepspeed.runtime.zero.partition_parameters",
        "DeepSpeedZeRoOffload": "deepspeed.runtime.zero.partition_parameters",
        "unwrap_model_for_generation": "deepspeed.runtime.zero.partition_parameters",
    },
)

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "register_external_parameter",
    "unregister_external_parameter",
]
