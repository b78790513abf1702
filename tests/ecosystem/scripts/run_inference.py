"""ZeRO inference without the Trainer, as transformers' documentation has it: weights that no rank has whole, and a sentence of its
own for each rank.

deepspeed --num_gpus 2 run_inference.py MODEL_FOLDER
"""

import json
import os
import sys

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.integrations import HfDeepSpeedConfig

import deepspeed
from tiny_models import Examples

world_size = int(os.getenv("WORLD_SIZE", "1"))
deepspeed.init_distributed()
model_name = sys.argv[1]
config = AutoConfig.from_pretrained(model_name)
hidden = config.d_model

ds_config = {
    "fp16": {"enabled": False},
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    },
    "steps_per_print": 2000,
    "train_batch_size": world_size,
    "train_micro_batch_size_per_gpu": 1,
    "wall_clock_breakdown": False,
}
# It must exist before the model, and as long as the model.
dschf = HfDeepSpeedConfig(ds_config)
model = AutoModelForSeq2SeqLM.from_pretrained(model_name)
engine = deepspeed.initialize(model=model, config_params=ds_config)[0]
engine.module.eval()

rank = torch.distributed.get_rank()
inputs = Examples("t5", world_size)[rank]["input_ids"].unsqueeze(0)
with torch.no_grad():
    # One rank stops earlier than the others.
    outputs = engine.module.generate(inputs, synced_gpus=True, do_sample=False, max_new_tokens=4 + 4 * rank)
with open(f"{rank}.json", "w") as file:
    json.dump(outputs[0].tolist(), file)
