"""`deepspeed.checkpointing`: recomputation of activations in backward."""

from deepspeed._features import unbuilt_class, unbuilt_function

_FEATURE = "activation checkpointing of its own (torch.utils.checkpoint works with the engine)"

configure = unbuilt_function("deepspeed.checkpointing.configure", _FEATURE)
checkpoint = unbuilt_function("deepspeed.checkpointing.checkpoint", _FEATURE)
non_reentrant_checkpoint = unbuilt_function("deepspeed.checkpointing.non_reentrant_checkpoint", _FEATURE)
reset = unbuilt_function("deepspeed.checkpointing.reset", _FEATURE)
get_cuda_rng_tracker = unbuilt_function("deepspeed.checkpointing.get_cuda_rng_tracker", _FEATURE)
model_parallel_cuda_manual_seed = unbuilt_function("deepspeed.checkpointing.model_parallel_cuda_manual_seed", _FEATURE)
model_parallel_reconfigure_tp_seed = unbuilt_function(
    "deepspeed.checkpointing.model_parallel_reconfigure_tp_seed", _FEATURE
)
CheckpointFunction = unbuilt_class("deepspeed.checkpointing.CheckpointFunction", _FEATURE)


def is_configured() -> bool:
    """Whether `configure` has been called: never, since it cannot be."""
    return False
