"""A script that touches most of the public face, for type checkers alone: nothing runs it. `make types`, `make check-python`."""

import argparse

import torch

import deepspeed
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.profiling.flops_profiler import get_model_profile
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.utils import RepeatingLoader, log_dist, logger, safe_get_full_fp32_param, set_z3_leaf_modules
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

parser = argparse.ArgumentParser()
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1}):
    other = torch.nn.Linear(2, 2)
with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
    meta = torch.nn.Linear(2, 2)
engine, optimizer, loader, scheduler = deepspeed.initialize(
    args=args, model=model, model_parameters=model.parameters(), config={"train_batch_size": 8}
)
typed: deepspeed.DeepSpeedEngine = engine
for batch in loader:
    loss = engine(batch)
    engine.backward(loss)
    engine.step()
norm: float | None = engine.get_global_grad_norm()
rates: list[float] = engine.get_lr()
size: int = engine.train_batch_size()
clip: float = engine.gradient_clipping()
engine.save_checkpoint("out", tag="a", client_state={"step": 1})
path, state = engine.load_checkpoint("out")
for p in engine.module.parameters():
    with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
        p.data.zero_()
    full = safe_get_full_fp32_param(p)
deepspeed.checkpointing.configure(None, partition_activations=False)
out = deepspeed.checkpointing.checkpoint(model, torch.ones(1, 4))
dist.all_reduce(torch.ones(1), op=dist.ReduceOp.SUM)
deepspeed.comm.barrier()
adam = deepspeed.ops.adam.FusedAdam(model.parameters(), lr=1e-3)
cpu = DeepSpeedCPUAdam(model.parameters())
fused = FusedAdam(model.parameters())
schedule = WarmupLR(adam, warmup_num_steps=10)
log_dist("hello", ranks=[0])
logger.info("x")
for _item in RepeatingLoader([1, 2]):
    break
set_z3_leaf_modules(model, [torch.nn.Linear])
weights = get_fp32_state_dict_from_zero_checkpoint("out")
flops, macs, params = get_model_profile(model, input_shape=(1, 4))
device: str = get_accelerator().current_device_name()
rank: int = deepspeed.comm.get_rank()
names: list[str] = list(deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES)
deepspeed.utils.groups._get_data_parallel_group()
version: str = deepspeed.__version__
