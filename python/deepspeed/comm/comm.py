"""The operations of `deepspeed.comm`, each one call of torch.distributed.

`prof`, `log_name` and `debug` are the original's labels for its communication logger; ours needs none.
Collectives return None, or with `async_op=True` a handle with `wait()`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import P2POp, ProcessGroup, ReduceOp

from deepspeed.comm.comms_logger import comms_logger, recorded

Group: TypeAlias = ProcessGroup | None
Work: TypeAlias = Any

__all__ = ["P2POp", "ProcessGroup", "ReduceOp"]


class _All:
    """The handle of several operations at once."""

    def __init__(self, works: Sequence[Work]):
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        return all([work.wait() if timeout is None else work.wait(timeout) for work in self._works])

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _together(start: Callable[..., Work], calls: Sequence[tuple[Any, ...]], async_op: bool) -> _All | None:
    pending = _All([start(*call) for call in calls])
    if async_op:
        return pending
    pending.wait()
    return None


def is_available() -> bool:
    """Whether this torch was built with torch.distributed."""
    return dist.is_available()


def is_initialized() -> bool:
    """Whether there is a process group, whoever made it."""
    return dist.is_available() and dist.is_initialized()


def new_group(ranks: Sequence[int]) -> Any:
    """A group of these global ranks; every rank of the world calls it, in the same order.

    A rank outside it gets torch's GroupMember.NON_GROUP_MEMBER.
    """
    return dist.new_group(list(ranks))


def destroy_process_group(group: Group = None) -> None:
    """Ends `group`, or all groups."""
    dist.destroy_process_group(group)


def get_rank(group: Group = None) -> int:
    """This process's rank in `group` (-1 when it is not a member)."""
    return dist.get_rank(group)


def get_world_size(group: Group = None) -> int:
    """Number of ranks in `group` (-1 when this process is not a member)."""
    return dist.get_world_size(group)


def get_local_rank() -> int:
    """This process's number on its host: LOCAL_RANK, 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_global_rank(group: Group = None, group_rank: int = 0) -> int:
    """The world's rank of `group_rank` in `group`."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_world_group() -> Group:
    """The group of all ranks."""
    return dist.group.WORLD


def get_all_ranks_from_group(group: Group = None) -> list[int]:
    """Global ranks of `group`, in the order of their ranks in it."""
    return dist.get_process_group_ranks(group)


def get_backend(group: Group = None) -> str:
    """The transport's name: "gloo", "nccl", ..."""
    return dist.get_backend(group)


@recorded
def broadcast(
    tensor: torch.Tensor,
    src: int,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "broadcast",
    debug: Any = None,
) -> Work | None:
    """Fills `tensor` on every rank with that of global rank `src`."""
    return dist.broadcast(tensor, src, group, async_op)


def broadcast_object_list(
    object_list: list[Any], src: int, group: Group = None, device: torch.device | None = None
) -> None:
    """Fills the list on every rank with the (picklable) objects of global rank `src`."""
    dist.broadcast_object_list(object_list, src, group, device)


@recorded
def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_gather",
    debug: Any = None,
) -> Work | None:
    """`tensor_list[i]` becomes rank i's `tensor`."""
    return dist.all_gather(tensor_list, tensor, group, async_op)


def all_gather_object(object_list: list[Any], obj: Any, group: Group = None) -> None:
    """`object_list[i]` becomes rank i's (picklable) `obj`."""
    dist.all_gather_object(object_list, obj, group)


@recorded
def all_gather_into_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_gather_into_tensor",
    debug: Any = None,
) -> Work | None:
    """Concatenates every rank's `tensor` in rank order into `output_tensor` (world times as long)."""
    return dist.all_gather_into_tensor(output_tensor, tensor, group, async_op)


allgather_fn = all_gather_into_tensor


@recorded
def all_gather_coalesced(
    output_tensors: Sequence[torch.Tensor],
    input_tensors: Sequence[torch.Tensor],
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_gather_coalesced",
    debug: Any = None,
) -> Work | None:
    """`all_gather_into_tensor` of each pair, waited for together."""
    calls = [(out, one, group, True) for out, one in zip(output_tensors, input_tensors, strict=True)]
    return _together(dist.all_gather_into_tensor, calls, async_op)


@recorded
def reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "reduce_scatter",
    debug: Any = None,
) -> Work | None:
    """`output` becomes the reduction over ranks of the entry of `input_list` at this rank's number."""
    return dist.reduce_scatter(output, input_list, op, group, async_op)


@recorded
def reduce_scatter_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "reduce_scatter_tensor",
    debug: Any = None,
) -> Work | None:
    """`output_tensor` becomes the reduction over ranks of this rank's part of `tensor` (world times as long)."""
    return dist.reduce_scatter_tensor(output_tensor, tensor, op, group, async_op)


reduce_scatter_fn = reduce_scatter_tensor


@recorded
def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_to_all_single",
    debug: Any = None,
) -> Work | None:
    """Part i of `tensor` goes to rank i; `output` is what the others sent here, in rank order."""
    return dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)


@recorded
def all_to_all(
    output_tensor_list: list[torch.Tensor],
    input_tensor_list: list[torch.Tensor],
    group: Group = None,
    async_op: bool = False,
) -> Work | None:
    """`input_tensor_list[i]` goes to rank i; `output_tensor_list[i]` comes from it."""
    return dist.all_to_all(output_tensor_list, input_tensor_list, group, async_op)


@recorded
def send(
    tensor: torch.Tensor,
    dst: int,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = "send",
    debug: Any = None,
) -> None:
    """Sends `tensor` to global rank `dst` and waits until it may be overwritten."""
    dist.send(tensor, dst, group, tag)


@recorded
def recv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = "recv",
    debug: Any = None,
) -> int:
    """Receives `tensor` from global rank `src`, or from any; returns the sender's rank."""
    return dist.recv(tensor, src, group, tag)


# torch's own: P2POp takes no others.
isend = dist.isend
irecv = dist.irecv


def batch_isend_irecv(
    p2p_op_list: list[P2POp], prof: bool = False, log_name: str = "batch_isend_irecv", debug: Any = None
) -> list[Work]:
    """Starts several sends and receives together."""
    return dist.batch_isend_irecv(p2p_op_list)


@recorded
def gather(
    tensor: torch.Tensor,
    gather_list: list[torch.Tensor] | None = None,
    dst: int = 0,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "gather",
    debug: Any = None,
) -> Work | None:
    """On global rank `dst`, `gather_list[i]` becomes rank i's `tensor`."""
    return dist.gather(tensor, gather_list, dst, group, async_op)


@recorded
def scatter(
    tensor: torch.Tensor,
    scatter_list: list[torch.Tensor] | None = None,
    src: int = 0,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "scatter",
    debug: Any = None,
) -> Work | None:
    """`tensor` on rank i becomes `scatter_list[i]` of global rank `src`."""
    return dist.scatter(tensor, scatter_list, src, group, async_op)


@recorded
def barrier(
    group: Group = None,
    async_op: bool = False,
    device_ids: list[int] | None = None,
    prof: bool = False,
    log_name: str = "barrier",
    debug: Any = None,
) -> Work | None:
    """Waits until every rank of `group` is here."""
    return dist.barrier(group, async_op, device_ids)


@recorded
def monitored_barrier(
    group: Group = None,
    timeout: timedelta | None = None,
    wait_all_ranks: bool = False,
    prof: bool = False,
    log_name: str = "monitored_barrier",
    debug: Any = None,
) -> None:
    """A barrier (Gloo only) that names the ranks that did not come within `timeout`."""
    dist.monitored_barrier(group, timeout, wait_all_ranks)


@recorded
def reduce(
    tensor: torch.Tensor,
    dst: int,
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "reduce",
    debug: Any = None,
) -> Work | None:
    """On global rank `dst`, `tensor` becomes the reduction over all ranks."""
    return dist.reduce(tensor, dst, op, group, async_op)


@recorded
def all_reduce(
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_reduce",
    debug: Any = None,
) -> Work | None:
    """`tensor` becomes the reduction over all ranks, on all of them."""
    return dist.all_reduce(tensor, op, group, async_op)


@recorded
def inference_all_reduce(
    tensor: torch.Tensor, op: Any = ReduceOp.SUM, group: Group = None, async_op: bool = False
) -> Work | None:
    """`all_reduce`; a device with a low-latency form of it would use that."""
    return dist.all_reduce(tensor, op, group, async_op)


@recorded
def all_reduce_coalesced(
    tensors: Sequence[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_reduce_coalesced",
    debug: Any = None,
) -> Work | None:
    """`all_reduce` of each tensor, waited for together."""
    return _together(dist.all_reduce, [(tensor, op, group, True) for tensor in tensors], async_op)


def initialize_mesh_device(mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> Any:
    """A torch DeviceMesh of this shape over the world's ranks, on the current accelerator."""
    from torch.distributed.device_mesh import init_device_mesh

    from deepspeed.accelerator import get_accelerator

    return init_device_mesh(get_accelerator().device_name(), tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Configures the communication logger: from the block `comms_logger` of a DeepSpeedConfig, then by the arguments."""
    if deepspeed_config is not None:
        comms_logger.configure(**deepspeed_config.native.block("comms_logger"))
    comms_logger.configure(enabled=enabled, prof_all=prof_all, prof_ops=prof_ops, verbose=verbose, debug=debug)


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Prints on rank 0 what the communication logger counted there.

    show_straggler  every rank calls it: prints each rank's whole time in collectives, too. The one that waits least is
                    the one that the others wait for.
    return_dict     returns {operation: {bytes: [calls, seconds of each]}}.
    """
    log = comms_logger.log
    if log is None:
        raise RuntimeError("the communication logger is off: set comms_logger.enabled, or comm.configure(enabled=True)")
    calls = log.calls()
    ranks: list[Any] = [None] * get_world_size() if show_straggler else []
    if show_straggler:
        dist.all_gather_object(ranks, sum(sum(times) for _, _, times in calls))
    if get_rank() == 0:
        print(log.summary(), flush=True)
        for rank, seconds in enumerate(ranks):
            print(f"rank {rank}: {1e3 * seconds:.3f} ms in collectives", flush=True)
    if not return_dict:
        return None
    found: dict[str, Any] = {}
    for operation, size, times in calls:
        found.setdefault(operation, {})[size] = [len(times), times]
    return found


def reset_log() -> None:
    """Forgets what the communication logger counted."""
    if comms_logger.log is not None:
        comms_logger.log.reset()
