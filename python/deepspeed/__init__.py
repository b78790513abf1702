"""DeepSpeed: trains any torch.nn.Module across processes, in mixed precision, with its state sharded.

Importing this package has no side effects and costs next to nothing: everything below is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepspeed._lazy import attach

__version__ = "0.20.0"
__version_major__, __version_minor__, __version_patch__ = 0, 20, 0
__git_hash__: str | None = None
__git_branch__: str | None = None

if TYPE_CHECKING:
    # Type checkers take a name for public where it is imported as itself.
    from deepspeed import accelerator as accelerator
    from deepspeed import comm as comm
    from deepspeed import ops as ops
    from deepspeed import runtime as runtime
    from deepspeed import utils as utils
    from deepspeed.accelerator import get_accelerator as get_accelerator
    from deepspeed.comm import init_distributed as init_distributed
    from deepspeed.runtime import zero as zero
    from deepspeed.runtime.arguments import add_config_arguments as add_config_arguments
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer as DeepSpeedOptimizer
    from deepspeed.runtime.base_optimizer import ZeROOptimizer as ZeROOptimizer
    from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedConfig
    from deepspeed.runtime.config import DeepSpeedConfigError as DeepSpeedConfigError
    from deepspeed.runtime.engine import DeepSpeedEngine as DeepSpeedEngine
    from deepspeed.runtime.initialize import initialize as initialize
    from deepspeed.runtime.optimizer_setup import DeepSpeedOptimizerCallable as DeepSpeedOptimizerCallable
    from deepspeed.runtime.optimizer_setup import DeepSpeedSchedulerCallable as DeepSpeedSchedulerCallable
    from deepspeed.utils import log_dist as log_dist
    from deepspeed.utils import logger as logger

    dist = comm

__getattr__, __dir__ = attach(
    __name__,
    submodules=(
        "_native",
        "accelerator",
        "checkpoint",
        "comm",
        "inference",
        "launcher",
        "module_inject",
        "monitor",
        "ops",
        "pipe",
        "profiling",
        "runtime",
        "utils",
    ),
    attributes={
        "dist": "deepspeed:comm",
        "zero": "deepspeed.runtime:zero",
        "checkpointing": "deepspeed.runtime.activation_checkpointing:checkpointing",
        "get_accelerator": "deepspeed.accelerator",
        "initialize": "deepspeed.runtime.initialize",
        "DeepSpeedEngine": "deepspeed.runtime.engine",
        "init_distributed": "deepspeed.comm",
        "add_config_arguments": "deepspeed.runtime.arguments",
        "DeepSpeedOptimizer": "deepspeed.runtime.base_optimizer",
        "ZeROOptimizer": "deepspeed.runtime.base_optimizer",
        "DeepSpeedOptimizerCallable": "deepspeed.runtime.optimizer_setup",
        "DeepSpeedSchedulerCallable": "deepspeed.runtime.optimizer_setup",
        "DeepSpeedConfig": "deepspeed.runtime.config",
        "DeepSpeedConfigError": "deepspeed.runtime.config",
        "DeepSpeedError": "deepspeed._native",
        "CommError": "deepspeed._native",
        "CheckpointError": "deepspeed._native",
        "NonFiniteGradientError": "deepspeed._native",
        "log_dist": "deepspeed.utils",
        "logger": "deepspeed.utils",
        "OnDevice": "deepspeed.utils",
        "PipelineModule": "deepspeed.pipe",
        "PipelineEngine": "deepspeed.pipe",
        "InferenceEngine": "deepspeed.inference",
        "DeepSpeedHybridEngine": "deepspeed.inference",
        "init_inference": "deepspeed.inference",
        "default_inference_config": "deepspeed.inference",
        "tp_model_init": "deepspeed.inference",
        "DeepSpeedTransformerLayer": "deepspeed.inference",
        "DeepSpeedTransformerConfig": "deepspeed.inference",
        "replace_transformer_layer": "deepspeed.module_inject",
        "set_autotp_mode": "deepspeed.module_inject",
    },
)
