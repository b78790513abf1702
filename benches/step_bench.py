"""One rank of the step benchmark: trains a GPT with one engine and prints one line `BENCH {json}` on rank 0.

--engine deepspeed   whichever `deepspeed` this interpreter has: forward, backward, step
--engine ddp         torch DistributedDataParallel over Gloo, autocast, fused AdamW, clipping
--engine bare        forward and backward only, no communication, no update: what no engine can avoid
"""

import argparse
import json
import os
import resource
import tempfile
import time

import torch
from gpt import GPT
from torch import nn


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--engine", choices=["deepspeed", "ddp", "bare"], default="deepspeed")
    p.add_argument("--stage", type=int, default=1)
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="bf16")
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--micro", type=int, default=4)
    p.add_argument("--accumulation", type=int, default=1)
    p.add_argument("--warmup", type=int, default=4)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--offload", choices=["none", "cpu", "nvme"], default="none", help="where optimizer state lies")
    p.add_argument("--nvme-path", default=tempfile.gettempdir(), help="the folder for --offload nvme")
    return p.parse_args()


class Bare:
    """Forward and backward in the model's dtype; gradients are dropped."""

    def __init__(self, model, a):
        self.model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[a.dtype])

    def __call__(self, *batch):
        return self.model(*batch)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.model.zero_grad(set_to_none=True)


class Ddp:
    """The loop that a user of plain torch writes."""

    def __init__(self, model, a):
        world = int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo")
        self.model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.mixed, self.clip, self.accumulation, self.micro_step = a.dtype == "bf16", a.clip, a.accumulation, 0

    def __call__(self, *batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            return self.model(*batch)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def step(self):
        self.micro_step += 1
        if self.micro_step % self.accumulation == 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


def config(a):
    out = {
        "train_micro_batch_size_per_gpu": a.micro,
        "gradient_accumulation_steps": a.accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 10},
        },
        "gradient_clipping": a.clip,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {"stage": a.stage},
    }
    if a.offload != "none":
        offload = {"device": a.offload, "pin_memory": False}
        if a.offload == "nvme":
            offload |= {"nvme_path": a.nvme_path, "pipeline_read": True, "pipeline_write": True}
        out["zero_optimization"]["offload_optimizer"] = offload
    if a.dtype != "fp32":
        out[a.dtype] = {"enabled": True}
    return out


def pss_mib():
    """Resident memory, each shared page divided among those that map it; None where the system does not tell."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) // 1024 for line in file if line.startswith("Pss:"))
    except OSError:
        return None


def median(values):
    return sorted(values)[len(values) // 2]


def main():
    a = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT(a.width, a.layers, a.length)
    parameters = sum(p.numel() for p in model.parameters())
    rank = int(os.environ.get("RANK", "0"))
    started = time.perf_counter()
    if a.engine == "deepspeed":
        import deepspeed

        imported = time.perf_counter() - started
        # No backend is named, so that each peer takes its own best for ranks of one host.
        deepspeed.init_distributed()
        started = time.perf_counter()
        engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(a))
    else:
        imported = 0.0
        engine = {"ddp": Ddp, "bare": Bare}[a.engine](model, a)
    initialized = time.perf_counter() - started

    generator = torch.Generator().manual_seed(1234 + rank)
    pattern = torch.arange(256).repeat(64)
    times, parts, losses = [], [], []
    for step in range(a.warmup + a.steps):
        forward = backward = update = 0.0
        for _ in range(a.accumulation):
            start = torch.randint(len(pattern) - a.length - 1, (a.micro, 1), generator=generator)
            windows = pattern[start + torch.arange(a.length + 1)]
            t0 = time.perf_counter()
            loss = engine(windows[:, :-1], windows[:, 1:])
            t1 = time.perf_counter()
            engine.backward(loss)
            t2 = time.perf_counter()
            engine.step()
            t3 = time.perf_counter()
            forward, backward, update = forward + t1 - t0, backward + t2 - t1, update + t3 - t2
        losses.append(loss.item())
        if step >= a.warmup:
            times.append(forward + backward + update)
            parts.append((forward, backward, update))
    out = {
        "parameters": parameters,
        "step_ms": median(times) * 1e3,
        "forward_ms": median([p[0] for p in parts]) * 1e3,
        "backward_ms": median([p[1] for p in parts]) * 1e3,
        "update_ms": median([p[2] for p in parts]) * 1e3,
        "import_s": imported,
        "initialize_s": initialized,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "pss_mib": pss_mib(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    if rank == 0:
        print("BENCH " + json.dumps(out), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
