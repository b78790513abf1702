"""`init_distributed`: finds out who this process is, and makes the process group unless there is one."""

from __future__ import annotations

import importlib.util
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepspeed import _native
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.job_store import job_secret, job_store
from deepspeed.utils.logging import logger

# torch's own; DEEPSPEED_TIMEOUT (minutes) takes its place when it is set at the time of the call.
default_pg_timeout: timedelta = dist.constants.default_pg_timeout

_explicit_backend: str | None = None


def explicit_backend() -> str | None:
    """The `dist_backend` that keeps the engine on torch.distributed; None when the choice of a transport is ours."""
    return _explicit_backend


def _asked_for(dist_backend: str | None) -> str | None:
    # accelerate and Lightning always name one: naming what would be used anyway asks for nothing.
    return dist_backend if dist_backend != get_accelerator().communication_backend_name() else None


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Makes torch.distributed's process group, or adopts the one that exists.

    Who this process is comes from, in this order: `rank` and `world_size`; the launcher's variables (RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); AzureML and SageMaker; Open MPI, PMI and Slurm; mpi4py where
    it is installed; else it is a world of one. What was found is written to those variables.

    dist_backend        "gloo", "nccl", ...; by default the accelerator's (gloo on a CPU). Naming another, or the long
                        form "cpu:gloo", keeps the engine on torch.distributed where it would have used shared memory.
    auto_mpi_discovery  False looks at the launcher's variables only.
    distributed_port    MASTER_PORT where nothing else names it.
    timeout             of collectives; by default DEEPSPEED_TIMEOUT minutes, else torch's.
    init_method         torch's URL of the rendezvous, in place of MASTER_ADDR and MASTER_PORT.
    dist_init_required  False asserts that a group exists already.
    """
    global _explicit_backend
    if dist.is_initialized():
        if dist_backend is not None:
            _explicit_backend = _asked_for(dist_backend)
        return
    if dist_init_required is False:
        raise AssertionError(
            "the process group is not initialised, and dist_init_required=False says that it must be: call "
            "deepspeed.init_distributed() first, or leave dist_init_required out"
        )
    backend = dist_backend or get_accelerator().communication_backend_name()
    options: dict[str, Any] = {"backend": backend, "timeout": timeout or _timeout_from_environment()}
    who = None
    if init_method is not None or (rank >= 0 and world_size > 0):
        options |= {"init_method": init_method or "env://", "rank": rank, "world_size": world_size}
    else:
        who = _who_am_i(auto_mpi_discovery, distributed_port)
        os.environ.update(who.environment())
        if who.master_addr is None:
            options |= {"store": dist.HashStore(), "rank": who.rank, "world_size": who.world_size}
    if backend == "nccl":
        options["device_id"] = _take_device(who.world_size if who else world_size)
    if verbose:
        logger.info("initialising torch.distributed with backend %s (%s)", backend, who.source if who else "arguments")
    try:
        if who is not None and who.master_addr is not None and (secret := job_secret()) is not None:
            patience = options["timeout"] or default_pg_timeout
            meeting = job_store(secret, who.rank, who.world_size, who.master_addr, who.master_port, patience)
            options |= {"store": meeting, "rank": who.rank, "world_size": who.world_size}
        dist.init_process_group(**options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _explain(error) from error
    _explicit_backend = _asked_for(dist_backend)


def mpi_discovery(distributed_port: int = 29500, verbose: bool = True) -> None:
    """Writes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as mpi4py's world has them."""
    who = _from_mpi4py(distributed_port)
    if who is None:
        raise ImportError("mpi_discovery needs mpi4py: pip install mpi4py")
    os.environ.update(who.environment())
    if verbose:
        logger.info("mpi4py: rank %d of %d, master %s:%s", who.rank, who.world_size, who.master_addr, who.master_port)


def _who_am_i(auto_discovery: bool, port: int) -> _native.Rendezvous:
    found = _native.discover_rendezvous(dict(os.environ), port, auto_discovery)
    if auto_discovery and (found is None or found.needs_master):
        found = _from_mpi4py(port) or found
    found = found or _native.Rendezvous.alone()
    found.require_master()
    return found


def _from_mpi4py(port: int) -> _native.Rendezvous | None:
    if importlib.util.find_spec("mpi4py") is None:
        return None
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    hosts = world.allgather(MPI.Get_processor_name())
    address = world.bcast(_own_address(), root=0)
    return _native.Rendezvous.from_hosts(world.Get_rank(), hosts, address, int(os.environ.get("MASTER_PORT", port)))


def _own_address() -> str:
    """The address from which this host reaches others; its name where it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation: chooses a route, sends nothing
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _take_device(world_size: int) -> torch.device:
    """Makes this process's CUDA device the current one, and returns it."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None and world_size != 1:
        raise RuntimeError(
            f"LOCAL_RANK is not set, so rank {os.environ.get('RANK')} does not know which of this host's devices is "
            "its own: set it for every rank, or start the job with the deepspeed command"
        )
    device = torch.device("cuda", int(local_rank or "0"))
    torch.cuda.set_device(device)
    return device


def _timeout_from_environment() -> timedelta | None:
    minutes = os.environ.get("DEEPSPEED_TIMEOUT")
    if minutes is None:
        return None
    try:
        return timedelta(minutes=float(minutes))
    except ValueError:
        raise ValueError(f"DEEPSPEED_TIMEOUT is {minutes!r}, expected a number of minutes") from None


def _explain(error: Exception) -> RuntimeError:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return RuntimeError(
            f"port {port} on {address} is in use by another program, perhaps an earlier job that still runs: end it, "
            "or choose another port with `deepspeed --master_port PORT`, with MASTER_PORT in the environment or "
            "with init_distributed(distributed_port=...)"
        )
    return RuntimeError(
        f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not meet the others at "
        f"{address}:{port} (MASTER_ADDR:MASTER_PORT): {error}"
    )
