"""Where the ranks of a job that the `deepspeed` command has started meet: torch's store, for those who know the job's secret.

    rank 0                                     another rank
      listens at MASTER_ADDR:MASTER_PORT   <---  connects
      leaves the job's mark there          --->  compares it with its own: another job's ends here, with an error
      all further keys begin with a name that only the secret gives

A rank of an earlier attempt, or of a job that was given the same port, is refused at once instead of waiting for ranks that never
come. On one host the port is open to this host only.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import socket
from datetime import timedelta

import torch.distributed as dist

_MARK = "deepspeed/job"
# Rank 0 leaves its mark as soon as it listens.
_PATIENCE = timedelta(seconds=60)


def job_secret() -> str | None:
    """The secret of the job that this process is a rank of; None where it was started by another launcher."""
    return None if dist.is_torchelastic_launched() else os.environ.get("DS_JOB_SECRET") or None


def job_store(secret: str, rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> dist.Store:
    """The store of the job with this secret, for `init_process_group`.

    Raises RuntimeError where another job listens at that address.
    """
    listener = _listen(address, port) if rank == 0 else None
    store = dist.TCPStore(
        address, port, world_size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener
    )  # fmt: skip
    mark = _derived(secret, "mark")
    if rank == 0:
        store.set(_MARK, mark)
    elif not hmac.compare_digest(_mark_of(store, min(timeout, _PATIENCE)), mark.encode()):
        raise RuntimeError(
            f"rank {rank} of {world_size} is refused: what listens at {address}:{port} (MASTER_ADDR:MASTER_PORT) does not know "
            "this job's secret (DS_JOB_SECRET), so it is rank 0 of another job, or of an earlier attempt that still runs; "
            "end that one, or choose another port with `deepspeed --master_port PORT`"
        )
    return dist.PrefixStore(_derived(secret, "keys"), store)


def _listen(address: str, port: int) -> int | None:
    """A socket for rank 0 that only this host can reach, where all ranks are on it; None leaves it to torch."""
    with contextlib.suppress(ValueError):
        if not ipaddress.ip_address(address).is_loopback:
            return None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # A port that is taken may be this process's own, of a group that it has ended: torch knows.
        with contextlib.suppress(OSError):
            return socket.create_server((address, port), family=family, backlog=1024).detach()
    return None


def _mark_of(store: dist.Store, patience: timedelta) -> bytes:
    try:
        store.wait([_MARK], patience)
    except dist.DistStoreError:
        return b""
    return store.get(_MARK)


def _derived(secret: str, purpose: str) -> str:
    """A value that follows from the secret, and from which the secret does not."""
    return hmac.digest(secret.encode(), f"deepspeed {purpose}".encode(), "sha256").hex()
