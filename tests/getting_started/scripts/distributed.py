"""A script that had its own torch.distributed.init_process_group: the page says what takes its place."""

import torch
from client import Loader, make_model, parse_arguments

import deepspeed

args = parse_arguments()

# torch.distributed.init_process_group(...) becomes:
deepspeed.init_distributed()

total = torch.ones(1)
torch.distributed.all_reduce(total)
rank = torch.distributed.get_rank()

model = make_model()
model_engine, _, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
for batch in Loader(2):
    model_engine.backward(model_engine(batch))
    model_engine.step()
print(f"rank {rank}: {total.item():.0f} ranks, {model_engine.global_steps} steps", flush=True)
