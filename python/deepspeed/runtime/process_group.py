"""The process group on which the engine's own collectives run, made on top of torch.distributed's."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deepspeed import _native
from deepspeed.comm.rendezvous import explicit_backend
from deepspeed.runtime.torch_transport import TorchTransport


def native_group() -> _native.Group:
    """A group of all ranks: none for a world of one, shared memory on one host, else torch.distributed."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return _native.Group.alone()
    deadline = dist.distributed_c10d._get_default_timeout(dist.get_backend()).total_seconds()
    identities: list[str] = [""] * world
    dist.all_gather_object(identities, _native.host_identity())
    if not _native.shares_memory(identities, explicit_backend()):
        name = f"torch.distributed ({dist.get_backend()})"
        return _native.Group.over_torch(TorchTransport(), rank, world, name)
    group = _native.Group.create_shared(world, deadline) if rank == 0 else None
    handle: list[Any] = [group.handle() if group is not None else None]
    dist.broadcast_object_list(handle, src=0)
    return group or _native.Group.join_shared(handle[0], rank, deadline)
