"""Adam on host memory, one process: this interpreter's DeepSpeedCPUAdam, torch's fused AdamW, and the memory, in turn.

An update reads parameter, gradient and two moments and writes all but the gradient: 28 bytes a parameter in fp32. Two
limits move the same 28 (14 read, 14 written): `copy` from one place to another, for which most processors first read
what they overwrite, and `in_place`, a multiplication that overwrites what it read, as Adam does. Prints `BENCH {json}`.
"""

import argparse
import json
import time

import torch


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parameters", type=float, default=50e6)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--deepspeed", action="store_true", help="time DeepSpeedCPUAdam too")
    a = p.parse_args()
    n = int(a.parameters)
    torch.set_num_threads(a.threads)

    def parameter():
        out = torch.nn.Parameter(torch.randn(n))
        out.grad = torch.randn(n) * 1e-2
        return out

    first = parameter()
    steps = {"torch_fused": torch.optim.AdamW([first], lr=1e-3, weight_decay=0.01, fused=True).step}
    if a.deepspeed:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        second = parameter()
        steps["cpu_adam"] = DeepSpeedCPUAdam([second], lr=1e-3, weight_decay=0.01).step
    source, target = torch.randn(n * 7 // 2), torch.ones(n * 7 // 2)
    steps["copy"] = lambda: target.copy_(source)
    steps["in_place"] = lambda: target.mul_(1.0)
    times = {name: [] for name in steps}
    for repeat in range(a.repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    out = {f"{name}_ms": sorted(v)[len(v) // 2] * 1e3 for name, v in times.items()}
    print("BENCH " + json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
