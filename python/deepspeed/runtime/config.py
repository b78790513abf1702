"""`DeepSpeedConfig`: the attributes of a judged ds_config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from deepspeed import _native
from deepspeed._native import DeepSpeedConfigError
from deepspeed.monitor.config import monitor_settings
from deepspeed.profiling.config import flops_profiler_settings
from deepspeed.runtime.zero.config import zero_settings
from deepspeed.utils.logging import logger

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError"]


class DeepSpeedConfig:
    """A config, judged as a whole: DeepSpeedConfigError lists every problem with its place and what to do.

    config  path of a file (JSON, comments allowed), a dict, or base64 of JSON.
    mpu     the client's model-parallel unit, whose data-parallel world the batch numbers are for; by default
            that is the process group's, else WORLD_SIZE, else 1.
    """

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    fp16_enabled: bool
    fp16_auto_cast: bool
    loss_scale: float
    dynamic_loss_scale: bool
    initial_dynamic_scale: float
    dynamic_loss_scale_args: dict[str, Any]
    bfloat16_enabled: bool
    check_grad_overflow: bool
    zero_enabled: bool
    zero_optimization_stage: int
    zero_config: SimpleNamespace
    optimizer_name: str | None
    optimizer_params: dict[str, Any] | None
    optimizer_legacy_fusion: bool
    scheduler_name: str | None
    scheduler_params: dict[str, Any] | None
    gradient_clipping: float
    prescale_gradients: bool
    gradient_predivide_factor: float
    communication_data_type: torch.dtype | None
    grad_accum_dtype: torch.dtype | None
    param_dtype: torch.dtype | None
    buffer_dtype: torch.dtype | None
    steps_per_print: int | None
    wall_clock_breakdown: bool
    memory_breakdown: bool
    dump_state: bool
    dataloader_drop_last: bool
    zero_allow_untested_optimizer: bool
    checkpoint_tag_validation_enabled: bool
    checkpoint_tag_validation_fail: bool
    load_universal_checkpoint: bool
    # The dict as given, or as read; what `engine.config` is.
    _param_dict: dict[str, Any]

    def __init__(self, config: str | os.PathLike[str] | Mapping[str, Any], mpu: Any = None, mesh_device: Any = None):
        self.native = judge(config)
        if _rank() == 0:
            for warning in self.native.warnings:
                logger.warning(warning)
        self.mpu = mpu
        self.world_size, origin = _data_parallel_world(mpu)
        batch = self.native.resolve_batch(self.world_size, origin)
        self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps = batch
        attributes = self.native.attributes()
        self.zero_config = zero_settings(self.native, attributes.pop("zero_settings"))
        vars(self).update(attributes)
        self.monitor_config = monitor_settings(self.native)
        self.flops_profiler_config = flops_profiler_settings(self.native)
        self._param_dict = dict(config) if isinstance(config, Mapping) else self.native.raw()

    def print_user_config(self) -> None:
        """Logs the config as it was given."""
        logger.info("config:\n%s", json.dumps(self._param_dict, indent=2, default=str))


def judge(config: str | os.PathLike[str] | Mapping[str, Any], template: bool = False) -> _native.Config:
    """The judged config of a file, a dict or base64; batch numbers may be missing. In a `template` "auto" may be left where
    somebody else fills it in later."""
    strict = os.environ.get("DS_CONFIG_STRICT")
    if isinstance(config, Mapping):
        return _native.Config.from_dict_text(json.dumps(config, default=str), strict, template)
    if isinstance(config, (str, os.PathLike)):
        return _native.Config.load(os.fspath(config), strict, template)
    raise DeepSpeedConfigError(
        f"a config is a dict, the path of a JSON file or base64 of JSON, not a {type(config).__qualname__}"
    )


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def _data_parallel_world(mpu: Any) -> tuple[int, str]:
    if mpu is not None:
        return mpu.get_data_parallel_world_size(), "the mpu's data-parallel world"
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), "the process group"
    return int(os.environ.get("WORLD_SIZE", "1")), "WORLD_SIZE"
