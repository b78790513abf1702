"""The Trainer in a notebook, as transformers' documentation has it: the cell is the launcher, and the config is a dict. Afterwards
the fp32 weights are taken out of the last checkpoint, into the model that was trained."""

from __future__ import annotations

import json
import os
import sys

os.environ["MASTER_ADDR"] = "localhost"
os.environ["MASTER_PORT"] = "0"
os.environ["RANK"] = "0"
os.environ["LOCAL_RANK"] = "0"
os.environ["WORLD_SIZE"] = "1"

import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint
from tiny_models import Examples, build

ds_config = json.loads(sys.argv[1])
set_seed(7)
args = TrainingArguments(
    output_dir="out", deepspeed=ds_config, per_device_train_batch_size=4, num_train_epochs=2, learning_rate=2e-3,
    logging_steps=1, save_strategy="epoch", report_to="none", disable_tqdm=True, use_cpu=True,
)  # fmt: skip
trainer = Trainer(model=build("gpt2"), args=args, train_dataset=Examples("gpt2", 16))
trainer.train()
trainer.save_state()

checkpoint_dir = get_last_checkpoint(trainer.args.output_dir)
state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir)
model = load_state_dict_from_zero_checkpoint(trainer.model, checkpoint_dir)
assert all(torch.equal(p, state[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
# It can be written and used like any other from here on.
model.load_state_dict(state)
example = {name: tensor.unsqueeze(0) for name, tensor in Examples("gpt2", 1)[0].items()}
assert torch.isfinite(model(**example).loss)
