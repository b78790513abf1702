"""The process group on which the engine's own collectives run, made on top of torch.distributed's."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from deepspeed import _native
from deepspeed.comm.comms_logger import comms_logger
from deepspeed.comm.rendezvous import explicit_backend
from deepspeed.runtime.torch_transport import StoreBoard, TorchTransport


def native_group() -> _native.Group:
    """A group of all ranks: none for a world of one, shared memory on one host, else torch.distributed."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return _native.Group.alone()
    deadline = _deadline()
    identities: list[Any] = [None] * world
    dist.all_gather_object(identities, (_native.host_identity(), _native.process_identity()))
    if not _native.shares_memory([host for host, _ in identities], explicit_backend()):
        name = f"torch.distributed ({dist.get_backend()})"
        return _native.Group.over_torch(TorchTransport(), StoreBoard(), rank, identities, name, deadline)
    group = _native.Group.create_shared(world, deadline) if rank == 0 else None
    handle: list[Any] = [group.handle() if group is not None else None]
    dist.broadcast_object_list(handle, src=0)
    return group or _native.Group.join_shared(handle[0], rank, deadline)


def recorded(group: _native.Group) -> _native.Group:
    """The group, with its collectives counted while the communication logger is on."""
    log = comms_logger.active_log()
    return group if log is None else group.recorded(log)


def _deadline() -> float:
    """How long ranks wait for each other, in seconds: what the process group was made with."""
    backend = dist.get_backend()
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    try:
        timeout = dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):  # a backend that keeps it to itself
        timeout = dist.distributed_c10d._get_default_timeout(backend)
    return float(timeout.total_seconds())


def ranks_per_host() -> int:
    """Ranks that share this host's memory, as far as the launcher has said; all of them where it has not."""
    world = dist.get_world_size()
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return min(int(said), world) if said and said.isdigit() and int(said) > 0 else world


_construction: tuple[Any, _native.Group] | None = None


def construction_group() -> _native.Group:
    """The group in which models are built sharded: made once per torch.distributed group."""
    global _construction
    default = dist.group.WORLD
    if _construction is None or _construction[0] is not default:
        _construction = (default, native_group())
    return _construction[1]
