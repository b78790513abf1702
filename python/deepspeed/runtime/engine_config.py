"""The engine's getters: one method per setting, as clients call them. Values come from the judged config."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
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

    def zero_use_cpu_optimizer(self) -> bool:
        """Whether the config asks for optimizer state off the device."""
        offload = self._config.zero_config.offload_optimizer
        return offload is not None and offload.device in ("cpu", "nvme")

    def zero_cpu_offload(self) -> bool:
        """Whether the config asks for optimizer state in the host's memory."""
        offload = self._config.zero_config.offload_optimizer
        return offload is not None and offload.device == "cpu"

    def zero_has_nvme_offload(self) -> bool:
        """Whether the config asks for optimizer state or weights on NVMe."""
        zero = self._config.zero_config
        return any(part is not None and part.device == "nvme" for part in (zero.offload_optimizer, zero.offload_param))

    def aio_config(self) -> dict[str, Any]:
        """The block `aio`: how files of offloaded state are read and written."""
        return self._config.native.block("aio")

    def use_node_local_storage(self) -> bool:
        """Whether each host keeps its own checkpoints."""
        return bool(self._config.native.block("checkpoint")["use_node_local_storage"])


def _getter(name: str, read: Callable[[DeepSpeedConfig], Any], doc: str) -> None:
    def getter(self: ConfigMethods) -> Any:
        return read(self._config)

    getter.__name__ = name
    getter.__qualname__ = f"ConfigMethods.{name}"
    getter.__doc__ = doc
    setattr(ConfigMethods, name, getter)


# Settings of the config under the names of their methods.
for _name, _doc in (
    ("fp16_enabled", "Whether the model trains in fp16."),
    ("bfloat16_enabled", "Whether the model trains in bf16."),
    ("fp16_auto_cast", "Whether floating-point inputs are cast to fp16."),
    ("initial_dynamic_scale", "The loss scale a dynamic scaler starts with."),
    ("dynamic_loss_scale_args", "The settings of the dynamic loss scaler."),
    ("gradient_clipping", "The gradient norm that is not exceeded; 0 is off."),
    ("gradient_predivide_factor", "The part of the division before the sum over ranks."),
    ("steps_per_print", "Updates between two step lines, or None."),
    ("dump_state", "Whether settings are shown at the start."),
    ("dataloader_drop_last", "Whether an incomplete last batch is left out."),
    ("wall_clock_breakdown", "Whether times per phase are asked for."),
    ("memory_breakdown", "Whether memory use per phase is asked for."),
    ("optimizer_name", "The config's `optimizer.type`, or None."),
    ("optimizer_params", "The config's `optimizer.params`, or None."),
    ("optimizer_legacy_fusion", "The config's `optimizer.legacy_fusion`."),
    ("scheduler_name", "The config's `scheduler.type`, or None."),
    ("scheduler_params", "The config's `scheduler.params`, or None."),
    ("zero_allow_untested_optimizer", "Whether any client optimizer may be sharded."),
    ("checkpoint_tag_validation_enabled", "Whether ranks that save under different tags are told so."),
    ("checkpoint_tag_validation_fail", "Whether ranks that save under different tags fail."),
    ("load_universal_checkpoint", "Whether a universal checkpoint is to be loaded."),
):
    _getter(_name, attrgetter(_name), _doc)

for _name in (
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "elastic_checkpoint",
    "ignore_unused_parameters", "load_from_fp32_weights", "log_trace_cache_warnings", "max_live_parameters",
    "max_reuse_distance", "model_persistence_threshold", "module_granularity_threshold", "offload_optimizer",
    "offload_param", "overlap_comm", "param_persistence_threshold", "prefetch_bucket_size", "reduce_bucket_size",
    "reduce_scatter", "round_robin_gradients", "sub_group_size",
):  # fmt: skip
    _getter(f"zero_{_name}", attrgetter(f"zero_config.{_name}"), f"The config's `zero_optimization` setting {_name}.")

for _name in (
    "enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file", "recompute_fwd_factor"
):  # fmt: skip
    _getter(
        f"flops_profiler_{_name}",
        attrgetter(f"flops_profiler_config.{_name}"),
        f"The config's `flops_profiler.{_name}`.",
    )

for _name, _feature in (
    ("autotuning_enabled", "autotuning"),
    ("curriculum_enabled_legacy", "curriculum learning"),
    ("curriculum_learning_enabled", "curriculum learning"),
    ("data_efficiency_enabled", "data efficiency"),
    ("random_ltd_enabled", "random layer-token drop"),
):
    _getter(_name, lambda _config: False, f"Whether {_feature} is on: it is not built.")
