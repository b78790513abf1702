"""Where a model trains: on the host by the engine's own kernels, or on an accelerator by torch's operations."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.rendezvous import explicit_backend

# Set to 1, a model on the CPU is trained as one on an accelerator is: with torch's operations. For tests.
FORCED = "DS_TORCH_DEVICE"


def device_of(parameters: Mapping[str, torch.Tensor]) -> torch.device:
    """The one device of all parameters."""
    first: tuple[str, torch.device] | None = None
    for name, parameter in parameters.items():
        here = parameter.device
        if here.type == "meta":
            raise ValueError(f"parameter `{name}` has no values: it is on {here}; give the model memory first")
        if first is not None and here != first[1]:
            raise ValueError(
                f"parameter `{name}` is on {here} and `{first[0]}` on {first[1]}: move the whole model to one device"
            )
        first = first or (name, here)
    return first[1] if first is not None else torch.device("cpu")


def choose_device(module: torch.nn.Module) -> torch.device:
    """Where `module` trains: where its parameters are, or, for a model on the CPU of a host with an accelerator, on this
    rank's one."""
    here = device_of(dict(module.named_parameters()))
    accelerator = get_accelerator()
    if here.type != "cpu" or accelerator.device_name() == "cpu":
        return here
    if dist.get_backend() != "nccl":  # with NCCL the process group has chosen already
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")) % max(1, accelerator.device_count()))
    return torch.device(accelerator.current_device_name())


def take_to(module: torch.nn.Module, device: torch.device, stage: int) -> None:
    """Moves what the engine does not: everything below stage 3, and at stage 3, where it takes shards of the parameters
    wherever they are, all else."""
    if stage < 3:
        module.to(device)
        return
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    for p in module.parameters():
        if p.numel() == 0 or p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            p.data = p.data.to(device)


def on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with copies of those that are not in the host's memory."""
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def torch_device(device: torch.device) -> torch.device | None:
    """`device`, where torch computes for the engine there; None for the host."""
    return device if device.type != "cpu" or os.environ.get(FORCED) == "1" else None


def moves_memory_of(device: torch.device) -> bool:
    """Whether torch.distributed itself moves this device's memory between ranks.

    Gloo lacks what reduces gradients for any device but the CPU: there it goes through the host's memory.
    """
    if dist.get_world_size() == 1:
        return False
    try:
        backend = dist.distributed_c10d._get_default_group()._get_backend(device).name()
    except RuntimeError:  # it has none for this device
        return False
    return explicit_backend() is not None if device.type == "cpu" else backend not in ("gloo", "mpi")
