"""The engine's getters: one method per setting, as clients call them. Values come from the judged config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed._native import Engine
    from deepspeed.runtime.config import DeepSpeedConfig


class ConfigMethods:
    """Mixed into the engine."""

    _config: DeepSpeedConfig
    _native: Engine

    def train_batch_size(self) -> int:
        """Samples of all ranks per update."""
        return self._native.batch()[0]

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one rank per micro-batch."""
        return self._native.batch()[1]

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per update."""
        return self._native.batch()[2]

    def loss_scale(self) -> float:
        """By what the loss is multiplied now; 1 outside fp16."""
        return self._native.loss_scale()

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts."""
        return self._native.dynamic_loss_scale()

    def zero_optimization(self) -> bool:
        """Whether the ZeRO stage is above 0."""
        return self._native.stage() > 0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self._native.stage()

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded (stage 2 and above)."""
        return self._native.stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether weights are sharded (stage 3)."""
        return self._native.stage() >= 3

    def postscale_gradients(self) -> bool:
        """Whether gradients are divided after the sum over ranks."""
        return not self._config.prescale_gradients

    @property
    def communication_data_type(self) -> torch.dtype | None:
        """The dtype gradients travel in; None for their own."""
        return self._config.communication_data_type

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtype of the model and the one gradients are accumulated in."""
        model = torch.bfloat16 if self._config.bfloat16_enabled else torch.float32
        model = torch.float16 if self._config.fp16_enabled else model
        return model, self._config.grad_accum_dtype or torch.float32

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether whole weights can be had for saving: always, but at stage 3 where they have to be gathered."""
        return not self._native.gathers_weights() or self._config.zero_config.gather_16bit_weights_on_model_save


def _getter(name: str, attribute: str, doc: str) -> Any:
    def getter(self: ConfigMethods) -> Any:
        return getattr(self._config, attribute)

    getter.__name__ = name
    getter.__qualname__ = f"ConfigMethods.{name}"
    getter.__doc__ = doc
    return getter


for _name, _attribute, _doc in (
    ("fp16_enabled", "fp16_enabled", "Whether the model trains in fp16."),
    ("bfloat16_enabled", "bfloat16_enabled", "Whether the model trains in bf16."),
    ("fp16_auto_cast", "fp16_auto_cast", "Whether floating-point inputs are cast to fp16."),
    ("initial_dynamic_scale", "initial_dynamic_scale", "The loss scale a dynamic scaler starts with."),
    ("dynamic_loss_scale_args", "dynamic_loss_scale_args", "The settings of the dynamic loss scaler."),
    ("gradient_clipping", "gradient_clipping", "The gradient norm that is not exceeded; 0 is off."),
    ("gradient_predivide_factor", "gradient_predivide_factor", "The part of the division before the sum over ranks."),
    ("steps_per_print", "steps_per_print", "Updates between two step lines, or None."),
    ("dump_state", "dump_state", "Whether settings are shown at the start."),
    ("wall_clock_breakdown", "wall_clock_breakdown", "Whether times per phase are asked for."),
    ("memory_breakdown", "memory_breakdown", "Whether memory use per phase is asked for."),
    ("optimizer_name", "optimizer_name", "The config's `optimizer.type`, or None."),
    ("optimizer_params", "optimizer_params", "The config's `optimizer.params`, or None."),
    ("scheduler_name", "scheduler_name", "The config's `scheduler.type`, or None."),
    ("scheduler_params", "scheduler_params", "The config's `scheduler.params`, or None."),
    (
        "zero_allow_untested_optimizer",
        "zero_allow_untested_optimizer",
        "Whether any client optimizer may be sharded.",
    ),
    (
        "checkpoint_tag_validation_enabled",
        "checkpoint_tag_validation_enabled",
        "Whether ranks that save under different tags are told so.",
    ),
    (
        "checkpoint_tag_validation_fail",
        "checkpoint_tag_validation_fail",
        "Whether ranks that save under different tags fail.",
    ),
    ("load_universal_checkpoint", "load_universal_checkpoint", "Whether a universal checkpoint is to be loaded."),
):
    setattr(ConfigMethods, _name, _getter(_name, _attribute, _doc))
