"""Process groups by role. Every rank is a data-parallel rank unless a client's `mpu` says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from deepspeed._features import not_built

# The client's model-parallel unit, set by `deepspeed.initialize(mpu=...)`.
mpu: Any = None


def set_mpu(unit: Any) -> None:
    """Takes the client's model-parallel unit, an object with get_{data,model}_parallel_{group,world_size,rank}()."""
    global mpu
    mpu = unit


def _get_world_group() -> dist.ProcessGroup | None:
    """The group of all ranks."""
    return dist.group.WORLD


def _get_data_parallel_group() -> dist.ProcessGroup | None:
    """The group over which gradients are averaged."""
    return mpu.get_data_parallel_group() if mpu is not None else dist.group.WORLD


def _get_data_parallel_world_size() -> int:
    return dist.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank() -> int:
    return dist.get_rank(_get_data_parallel_group())


def _get_data_parallel_group_ranks() -> list[int]:
    """Global ranks of the data-parallel group."""
    return dist.get_process_group_ranks(_get_data_parallel_group())


def _get_broadcast_src_rank() -> int:
    """The global rank whose weights the data-parallel group starts from."""
    return _get_data_parallel_group_ranks()[0]


def _get_model_parallel_world_size() -> int:
    return mpu.get_model_parallel_world_size() if mpu is not None else 1


def _get_model_parallel_rank() -> int:
    return mpu.get_model_parallel_rank() if mpu is not None else 0


def _get_model_parallel_group() -> dist.ProcessGroup | None:
    """The client's model-parallel group; None when there is none."""
    return mpu.get_model_parallel_group() if mpu is not None else None


def _get_sequence_parallel_world_size() -> int:
    return 1


def _get_sequence_parallel_rank() -> int:
    return 0


def _get_sequence_data_parallel_group() -> dist.ProcessGroup | None:
    return _get_data_parallel_group()


def _get_sequence_data_parallel_world_size() -> int:
    return _get_data_parallel_world_size()


def _get_sequence_data_parallel_rank() -> int:
    return _get_data_parallel_rank()


def get_data_parallel_group() -> dist.ProcessGroup | None:
    """The group over which gradients are averaged."""
    return _get_data_parallel_group()


def get_data_parallel_world_size() -> int:
    return _get_data_parallel_world_size()


def get_data_parallel_rank() -> int:
    return _get_data_parallel_rank()


def get_model_parallel_world_size() -> int:
    return _get_model_parallel_world_size()


def get_model_parallel_rank() -> int:
    return _get_model_parallel_rank()


_NOT_BUILT_BY_WORD = {
    "expert": "mixture of experts",
    "sequence_parallel_group": "sequence parallelism",
    "tensor": "tensor parallelism",
    "zero_param": "ZeRO++",
}


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """The remaining getters of the original exist, and name the feature that they need."""
    if not name.startswith("__"):
        for word, feature in _NOT_BUILT_BY_WORD.items():
            if word in name:
                return lambda *_args, **_kwargs: not_built(f"deepspeed.utils.groups.{name}", feature)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
