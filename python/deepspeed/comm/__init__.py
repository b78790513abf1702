"""Collectives over torch.distributed under the names that `deepspeed.comm` has always had.

`from deepspeed import comm as dist` is a stand-in for `torch.distributed`. There is no state of our own: a group
that torch.distributed already has is used as it is.
"""

from deepspeed.comm.comm import (
    ReduceOp,
    all_gather,
    all_gather_coalesced,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_reduce_coalesced,
    all_to_all,
    all_to_all_single,
    allgather_fn,
    barrier,
    batch_isend_irecv,
    broadcast,
    broadcast_object_list,
    configure,
    destroy_process_group,
    gather,
    get_all_ranks_from_group,
    get_backend,
    get_global_rank,
    get_local_rank,
    get_rank,
    get_world_group,
    get_world_size,
    inference_all_reduce,
    initialize_mesh_device,
    irecv,
    is_available,
    is_initialized,
    isend,
    log_summary,
    monitored_barrier,
    new_group,
    P2POp,
    ProcessGroup,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_fn,
    reduce_scatter_tensor,
    reset_log,
    scatter,
    send,
)
from deepspeed.comm.rendezvous import default_pg_timeout, explicit_backend, init_distributed, mpi_discovery

__all__ = [name for name in dir() if not name.startswith("_") and name not in ("comm", "rendezvous")]
