"""Trains a small model and prints its losses: the same whatever the hosts that the ranks are on."""

import argparse
import os

import torch
import torch.distributed as dist

import deepspeed

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
config = {
    "train_batch_size": 16,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 2},
}
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
rank, world = dist.get_rank(), dist.get_world_size()
for step in range(5):
    batch = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
    part = batch.chunk(world)[rank]
    loss = engine(part).square().mean()
    engine.backward(loss)
    engine.step()
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    if rank == 0:
        print(f"step {step} loss {whole.item() / world:.6f}", flush=True)
if rank == 0 and "CROSS_SIZE" in os.environ:
    print(f"{world} ranks on {os.environ['CROSS_SIZE']} hosts of {os.environ['LOCAL_SIZE']}", flush=True)
