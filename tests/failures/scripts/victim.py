"""Trains until something happens to it. `--mode` says what: what this rank does in its loop, or how it fails."""

import argparse
import os
import sys
import time

import deepspeed
from toy import build, config, micro_step, start

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--mode", default="train")
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--config")
parser.add_argument("--folder", default="saves")
args = parser.parse_args()

rank = int(os.environ["RANK"])
if args.config:
    deepspeed.initialize(model=build(), config=args.config)
engine = start(config(args.stage, scheduler=None))
micro_step(engine, 0)
engine.save_checkpoint(args.folder, "good")
worker = iter(())
if args.mode == "forward":
    # A process of the rank's own, which has to end with it.
    loader = engine.deepspeed_io(range(1_000_000), num_local_io_workers=1)
    worker = iter(loader)
    next(worker)
print(f"rank {rank} ready, process {os.getpid()}", flush=True)

for index in range(1, 1_000_000):
    if args.mode == "forward":
        # Both ranks spend their time here, out of reach of any collective.
        next(worker)
        time.sleep(0.2)
        micro_step(engine, index)
    elif args.mode == "collective":
        # Rank 1 waits in a collective for rank 0 nearly always.
        if rank == 0:
            time.sleep(0.5)
        micro_step(engine, index)
    elif args.mode == "save":
        engine.save_checkpoint(args.folder, f"step{index % 4}", client_state={"index": index})
    elif args.mode == "raise":
        if rank == 1 and index == 3:
            raise KeyError("the reason of rank 1")
        micro_step(engine, index)
    elif args.mode == "leave":
        if rank == 1 and index == 3:
            sys.exit(0)
        micro_step(engine, index)
    else:
        micro_step(engine, index)
