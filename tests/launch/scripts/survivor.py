"""Trains six steps, saving each, from where the last complete checkpoint has left off. In the first attempt rank 1 is killed in step 4.

With `always`, rank 1 is killed there in every attempt.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

import deepspeed

folder, when = sys.argv[-2:]
torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
config = {
    "train_batch_size": 8,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 1},
}
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
rank, world = dist.get_rank(), dist.get_world_size()
engine.load_checkpoint(folder)
attempt = int(os.environ.get("DS_RESTART_COUNT", "0"))
if rank == 0:
    reason, failed = os.environ.get("DS_RESTART_REASON"), os.environ.get("DS_RESTART_STEP")
    print(f"attempt {attempt} after {engine.global_steps} steps, because of {reason} in step {failed}", flush=True)
for step in range(engine.global_steps + 1, 7):
    batch = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
    loss = engine(batch).square().mean()
    engine.backward(loss)
    if step == 4 and rank == 1 and (when == "always" or (when == "once" and attempt == 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    engine.step()
    if rank == 0:
        print(f"step {step} loss {loss.item():.6f}", flush=True)
    engine.save_checkpoint(folder)
