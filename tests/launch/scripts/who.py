"""Says who it is once it has met the others, who found no launcher but MPI or Slurm."""

import os
import sys

import torch
import torch.distributed as dist

import deepspeed

deepspeed.init_distributed(distributed_port=int(sys.argv[1]))
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
place = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR")]
# In one piece: the ranks share their output.
os.write(1, f"found {' '.join(map(str, place))}, {int(total)} together\n".encode())
dist.destroy_process_group()
