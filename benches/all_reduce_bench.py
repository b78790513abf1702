"""One rank of the all-reduce benchmark; rank 0 prints one line `BENCH {json}`.

Times torch.distributed's Gloo, and with --deepspeed also `all_reduce` and `inference_all_reduce` of this interpreter's
`deepspeed.comm`, in turn, on the same tensor.
"""

import argparse
import json
import os
import time

import torch


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--mib", type=float, default=32)
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--deepspeed", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    operations = {"gloo": torch.distributed.all_reduce}
    if a.deepspeed:
        import deepspeed

        deepspeed.init_distributed()
        operations["all_reduce"] = deepspeed.comm.all_reduce
        operations["inference_all_reduce"] = deepspeed.comm.inference_all_reduce
    else:
        torch.distributed.init_process_group("gloo")
    numbers = int(a.mib * 2**20 / 4)
    tensor = torch.empty(numbers)
    times = {name: [] for name in operations}
    for repeat in range(a.repeats + 3):
        for name, operation in operations.items():
            tensor.fill_(1.0)
            torch.distributed.barrier()
            started = time.perf_counter()
            operation(tensor)
            elapsed = time.perf_counter() - started
            if tensor[0].item() != world or tensor[-1].item() != world:
                raise SystemExit(f"{name} gave {tensor[0].item()} and {tensor[-1].item()}, not {world}")
            if repeat >= 3:
                times[name].append(elapsed)
    if int(os.environ["RANK"]) == 0:
        out = {f"{name}_ms": sorted(v)[len(v) // 2] * 1e3 for name, v in times.items()}
        print("BENCH " + json.dumps(out), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
