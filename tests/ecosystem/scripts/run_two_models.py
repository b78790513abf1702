"""Two models with two DeepSpeed configs, as accelerate's documentation has it: a student that learns from a teacher, which is
sharded and only looked at."""

from __future__ import annotations

import json
import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, set_seed
from torch.utils.data import DataLoader

from tiny_models import Examples, build


def main() -> None:
    student_plugin = DeepSpeedPlugin(
        hf_ds_config={
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 2},
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        }
    )
    teacher_plugin = DeepSpeedPlugin(
        hf_ds_config={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    )
    accelerator = Accelerator(
        deepspeed_plugins={"student": student_plugin, "teacher": teacher_plugin},
        kwargs_handlers=None if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")],
    )
    set_seed(7)
    student = build("llama")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    loader = DataLoader(Examples("llama", 32), batch_size=4)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    state = AcceleratorState()
    state.select_deepspeed_plugin("teacher")
    # What is built from here on is sharded.
    teacher = accelerator.prepare(build("gpt2"))
    teacher.eval()
    state.select_deepspeed_plugin("student")
    losses = []
    for batch in loader:
        with torch.no_grad():
            goal = teacher(**batch).logits.float().softmax(-1)
        output = student(**batch)
        loss = output.loss + torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), goal.flatten(0, 1))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    if accelerator.is_main_process:
        os.makedirs("out", exist_ok=True)
        with open("out/results.json", "w") as file:
            json.dump({"losses": losses, "teacher": str(next(teacher.parameters()).dtype)}, file)


if __name__ == "__main__":
    main()
