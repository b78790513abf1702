"""One rank of `deepspeed bench comm --backend gloo|nccl`: runs each collective of the job that it is given, and times it.

Rank 0 prints one line of JSON for each; the command makes a table of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.rendezvous import init_distributed

_MARK = "deepspeed-bench "
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Call = Callable[[], Any]


def _call(name: str, numbers: torch.Tensor, shard: torch.Tensor) -> tuple[Call, torch.Tensor]:
    """The collective, and where its result will be. numbers: the whole; shard: a rank's share of it."""
    other = torch.empty_like(numbers)
    calls: dict[str, tuple[Call, torch.Tensor]] = {
        "all_reduce": (lambda: dist.all_reduce(numbers), numbers),
        "broadcast": (lambda: dist.broadcast(numbers, 0), numbers),
        "all_gather": (lambda: dist.all_gather_into_tensor(other, shard), other),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(shard, numbers), shard),
        "all_to_all": (lambda: dist.all_to_all_single(other, numbers), other),
    }
    return calls[name]


def _measure(cell: dict[str, Any], job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    world = dist.get_world_size()
    dtype = _DTYPES[cell["dtype"]]
    share = max(cell["bytes"] // dtype.itemsize // world, 1)
    # Ones: every result is ones, or the number of ranks where it is a sum.
    numbers = torch.ones(share * world, dtype=dtype, device=device)
    shard = torch.ones(share, dtype=dtype, device=device)
    row = {"op": cell["op"], "dtype": cell["dtype"], "bytes": numbers.nbytes, "seconds": None, "wrong": None}
    call, result = _call(cell["op"], numbers, shard)
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        return row | {"skipped": str(error).splitlines()[0]}
    expected = world if cell["op"] in ("all_reduce", "reduce_scatter") else 1
    wrong = (result != expected).sum().item()
    numbers.zero_()
    for _ in range(job["warmups"]):
        call()
    dist.barrier()
    get_accelerator().synchronize()
    began = time.perf_counter()
    for _ in range(job["trials"]):
        call()
    get_accelerator().synchronize()
    took = torch.tensor([(time.perf_counter() - began) / job["trials"]], dtype=torch.float64, device=device)
    bad = torch.tensor([wrong], device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    dist.all_reduce(bad)
    return row | {"seconds": took.item(), "wrong": bad.item(), "skipped": None}


def main() -> None:
    job = json.loads(sys.argv[1])
    init_distributed(dist_backend=job["backend"], verbose=False)
    device = torch.device("cpu" if job["backend"] == "gloo" else get_accelerator().current_device_name())

    def tell(value: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            print(_MARK + json.dumps(value), flush=True)

    hosts = int(os.environ.get("CROSS_SIZE", "1"))
    transport = f"torch.distributed ({job['backend']})"
    counts = {name: job[name] for name in ("trials", "warmups")}
    tell({"world": dist.get_world_size(), "hosts": hosts, "transport": transport, **counts})
    for cell in job["cells"]:
        tell(_measure(cell, job, device))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
