"""The page's three ways to a learning rate schedule: DeepSpeed's own, one that it manages, one that it knows nothing of."""

import torch
from client import Loader, make_model, parse_arguments

import deepspeed

args = parse_arguments()
CONFIG = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 2,
                                         "warmup_type": "linear"}}  # fmt: skip


def train(engine, epoch_end=None):
    rates = []
    for _epoch in range(2):
        for batch in Loader(2):
            engine.backward(engine(batch))
            engine.step()
            rates.append(round(engine.get_lr()[0], 6))
        if epoch_end is not None:
            epoch_end()
    return rates


# From the config: stepped after every update.
engine, _, _, scheduler = deepspeed.initialize(model=make_model(), config={**CONFIG, "scheduler": WARMUP})
print("config", train(engine), type(scheduler).__name__)

# One's own, at every step: passed to initialize, which then manages it.
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step_lr = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
settings = {"train_batch_size": 8}
engine, _, _, scheduler = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=step_lr, config=settings)
print("managed", train(engine), scheduler is step_lr)

# One's own, once an epoch: not passed, and stepped here.
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step_lr = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
engine, _, _, scheduler = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
print("apart", train(engine, epoch_end=step_lr.step), scheduler)
