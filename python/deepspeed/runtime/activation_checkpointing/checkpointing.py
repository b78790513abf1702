"""`deepspeed.checkpointing`: activations are computed again in backward instead of being kept.

Recomputation itself is torch.utils.checkpoint's (the form without a nested backward pass). What is added here: where the
kept inputs are stored (on the host, in shares of a model-parallel group, in one buffer for several checkpoints), random
states per model-parallel rank, timings.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, judge
from deepspeed.utils.logging import log_dist, warning_once

_MODEL_PARALLEL_RNG = "model-parallel-rng"
# Model-parallel ranks draw from seeds that are this far from those of data-parallel ranks, as in the original.
_MODEL_PARALLEL_SEED_OFFSET = 2718

# The block activation_checkpointing: its keys and the arguments of `configure` they stand for.
_KEYS = {
    "partition_activations": "partition_activations",
    "cpu_checkpointing": "checkpoint_in_cpu",
    "contiguous_memory_optimization": "contiguous_checkpointing",
    "number_checkpoints": "num_checkpoints",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}


@dataclasses.dataclass(frozen=True)
class _Settings:
    partition_activations: bool = False
    checkpoint_in_cpu: bool = False
    contiguous_checkpointing: bool = False
    num_checkpoints: float | None = None  # a config may write 4e0
    synchronize: bool = False
    profile: bool = False


_configured = False
_settings = _Settings()
_mpu: Any = None


def configure(
    mpu_: Any,
    deepspeed_config: str | os.PathLike[str] | Mapping[str, Any] | DeepSpeedConfig | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Sets how `checkpoint` stores what it keeps. An argument that is given wins over the config's block.

    mpu_                      the client's model-parallel unit, or None.
    deepspeed_config          a config whose block activation_checkpointing has the rest.
    partition_activations     each model-parallel rank keeps its share of the inputs, which must be the same on all.
    contiguous_checkpointing  the shares of `num_checkpoints` checkpoints lie in one buffer; needs both.
    checkpoint_in_cpu         inputs are kept in the host's memory.
    synchronize               the device finishes its work before and after each checkpoint.
    profile                   the time of each checkpoint is logged.
    """
    global _configured
    given = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    _set(mpu_, _block(deepspeed_config) | {name: value for name, value in given.items() if value is not None})
    _configured = True


def adopt(config: DeepSpeedConfig, mpu: Any) -> None:
    """Takes the settings of the config's block, if it has one and the client has not called `configure`."""
    block = _block(config)
    if block and not _configured:
        _set(mpu, block)


def _set(mpu: Any, chosen: dict[str, Any]) -> None:
    global _settings, _mpu
    settings = _Settings(**chosen)
    if settings.contiguous_checkpointing and not (settings.partition_activations and settings.num_checkpoints):
        raise ValueError(
            "contiguous_checkpointing (contiguous_memory_optimization in the config) needs partition_activations and "
            f"num_checkpoints; they are {settings.partition_activations} and {settings.num_checkpoints}"
        )
    _settings, _mpu = settings, mpu
    reset()
    if settings.partition_activations and _group() is None:
        warning_once("partition_activations has no effect: there is no model-parallel group whose ranks could share")


def _block(config: Any) -> dict[str, Any]:
    """The config's block, by the names of `configure`'s arguments."""
    if config is None:
        return {}
    native = config.native if isinstance(config, DeepSpeedConfig) else judge(config)
    block = native.raw().get("activation_checkpointing") or {}
    return {_KEYS[key]: value for key, value in block.items() if value is not None}


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _configured


def reset() -> None:
    """Forgets partly filled buffers of contiguous_checkpointing, as after a forward pass without a backward."""
    _buffers.clear()


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns `function(*args, **kwargs)`; in backward the function runs again, with the same random numbers.

    Arguments and results may be anything. What is stored elsewhere by `configure` are floating-point tensors in `args`.
    """
    with _storage():
        return torch_checkpoint(_Run(function, kwargs), *args, use_reentrant=False)


non_reentrant_checkpoint = checkpoint


class CheckpointFunction:
    """The original's autograd function, for clients that call it by name."""

    @staticmethod
    def apply(run_function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """As `checkpoint`, with the results appended to `all_outputs` as well."""
        result = checkpoint(run_function, *args)
        all_outputs.extend(result if isinstance(result, tuple) else (result,))
        return result


class _Run:
    """The client's function: run once in forward, and again in backward with the model-parallel random states it had."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]):
        # Keyword arguments are kept here, not given to torch, which has some of its own.
        self.function, self.kwargs, self.settings = function, kwargs, _settings
        self.states: dict[str, torch.Tensor] | None = None

    def __call__(self, *args: Any) -> Any:
        again, tracker = self.states is not None, get_cuda_rng_tracker()
        now = tracker.get_states()
        if self.states is None:
            self.states = now
        else:
            tracker.set_states(self.states)
        if self.settings.synchronize or self.settings.profile:
            get_accelerator().synchronize()
        began = time.perf_counter()
        try:
            return self.function(*args, **self.kwargs)
        finally:
            # Recomputation ends with an exception of torch's once everything that was asked for is there.
            if self.settings.synchronize or self.settings.profile:
                get_accelerator().synchronize()
            if self.settings.profile:
                what = "recomputation" if again else "forward"
                took = 1e3 * (time.perf_counter() - began)
                log_dist(f"checkpoint: {what} took {took:.3f} ms", ranks=[0], level=logging.WARNING)
            if again:
                tracker.set_states(now)


# -- where inputs are kept ---------------------------------------------------------------------------------------------

# By dtype, device and elements of a share: the buffer that is being filled and how many shares it has.
_buffers: dict[tuple[torch.dtype, torch.device, int], tuple[torch.Tensor, int]] = {}


def _storage() -> AbstractContextManager[Any]:
    """The hooks under which torch keeps the inputs of one checkpoint."""
    settings, group = _settings, _group() if _settings.partition_activations else None
    if group is None and not settings.checkpoint_in_cpu:
        return nullcontext()

    def pack(tensor: torch.Tensor) -> Any:
        if not tensor.is_floating_point() or (group is None and tensor.device.type == "cpu"):
            return tensor
        kept = tensor.detach() if group is None else _share(tensor.detach(), group)
        if settings.checkpoint_in_cpu:
            kept = kept.cpu()
        if settings.contiguous_checkpointing and group is not None:
            kept = _into_buffer(kept, int(settings.num_checkpoints or 1))
        return kept, tensor.device, tensor.shape

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        data, device, shape = kept
        data = data.to(device)
        return data if group is None else _whole(data, shape, group)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _group() -> Any:
    """The client's model-parallel group; None where it has one rank."""
    return _of_mpu("group") if _mpu is not None and _of_mpu("world_size") > 1 else None


def _of_mpu(what: str) -> Any:
    """The world_size, rank or group of the client's model-parallel unit, by whichever of the two names it has."""
    get = getattr(_mpu, f"get_tensor_model_parallel_{what}", None)
    return (get or getattr(_mpu, f"get_model_parallel_{what}"))()


def _share(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's share of a tensor that all ranks of `group` have: flat, padded to equal lengths, memory of its own."""
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    length = math.ceil(tensor.numel() / ranks)
    share = tensor.new_zeros(length)
    part = tensor.reshape(-1)[rank * length : (rank + 1) * length]
    share[: part.numel()] = part
    return share


def _whole(share: torch.Tensor, shape: torch.Size, group: Any) -> torch.Tensor:
    flat = share.new_empty(share.numel() * torch.distributed.get_world_size(group))
    torch.distributed.all_gather_into_tensor(flat, share.contiguous(), group=group)
    return flat[: shape.numel()].view(shape)


def _into_buffer(share: torch.Tensor, count: int) -> torch.Tensor:
    """A copy of `share` in a buffer for `count` of its kind. A full buffer lives as long as what lies in it."""
    key = (share.dtype, share.device, share.numel())
    buffer, used = _buffers.pop(key) if key in _buffers else (share.new_empty((count, share.numel())), 0)
    if used + 1 < count:
        _buffers[key] = (buffer, used + 1)
    return buffer[used].copy_(share)


# -- random numbers ----------------------------------------------------------------------------------------------------


class CudaRNGStatesTracker:
    """Named random states of the device, so that model-parallel ranks draw apart where they must and alike elsewhere."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forgets all states."""
        self.states_, self.seeds_ = {}, set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """The states by name."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replaces the states."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """A new state `name`, that of the device after seeding it with `seed`."""
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"the random state {name!r} or the seed {seed} is tracked already")
        self.seeds_.add(seed)
        device = get_accelerator()
        before = device.get_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.get_rng_state()
        device.set_rng_state(before)

    @contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG) -> Iterator[None]:
        """A stretch whose random numbers come from the state `name`, which moves on; the device's own does not."""
        if name not in self.states_:
            raise KeyError(f"no random state {name!r}: call model_parallel_cuda_manual_seed, or add(name, seed)")
        device = get_accelerator()
        before = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(before)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The process's tracker, whatever the device."""
    return _tracker


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seeds the device alike on all model-parallel ranks, and the tracker's model-parallel state apart on each."""
    _tracker.reset()
    get_accelerator().manual_seed(seed)
    _tracker.add(_MODEL_PARALLEL_RNG, _model_parallel_seed(seed))


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seeds the tracker's model-parallel state anew."""
    with _tracker.fork():
        get_accelerator().manual_seed(_model_parallel_seed(seed))


def _model_parallel_seed(seed: int) -> int:
    return seed + _MODEL_PARALLEL_SEED_OFFSET + (_of_mpu("rank") if _mpu is not None else 0)
