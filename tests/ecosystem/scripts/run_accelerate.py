"""accelerate's training loop with DeepSpeed, as its documentation has it:

accelerate launch --config_file deepspeed.yaml run_accelerate.py
deepspeed --num_gpus 2 run_accelerate.py --zero_stage 3
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DummyOptim,
    DummyScheduler,
    InitProcessGroupKwargs,
    set_seed,
)
from torch.utils.data import DataLoader
from transformers import get_scheduler

from tiny_models import Examples, build


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--zero_stage", type=int, help="without it, `accelerate launch` says what DeepSpeed is to do")
    parser.add_argument("--ds_config", help="a DeepSpeed config file")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--mixed_precision")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--save_at", type=int, help="save the state after this many updates")
    parser.add_argument("--resume_from_checkpoint", help="the folder of such a state")
    parser.add_argument("--offload", default="none")
    parser.add_argument(
        "--seedable", action="store_true", help="the order of an epoch follows from seed and epoch alone"
    )
    args = parser.parse_args()
    plugin = None
    if args.ds_config:
        plugin = DeepSpeedPlugin(hf_ds_config=args.ds_config)
    elif args.zero_stage is not None:
        plugin = DeepSpeedPlugin(
            zero_stage=args.zero_stage,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_clipping=1.0,
            offload_optimizer_device=args.offload,
            zero3_save_16bit_model=True,
        )
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        deepspeed_plugin=plugin,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=args.seedable),
        # Without a GPU accelerate wants to be told what its processes talk over.
        kwargs_handlers=None if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")],
    )
    set_seed(7)
    model = build(args.model)
    loader = DataLoader(Examples(args.model, args.examples), batch_size=4, shuffle=True)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    total = args.epochs * len(loader) // args.gradient_accumulation_steps
    if "optimizer" in config:
        optimizer = DummyOptim(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if "scheduler" in config:
        scheduler = DummyScheduler(optimizer, total_num_steps=total, warmup_num_steps=2)
    elif isinstance(optimizer, DummyOptim):
        scheduler = DummyScheduler(
            optimizer,
            lr_scheduler_callable=lambda real: get_scheduler(
                "linear", real, num_warmup_steps=2, num_training_steps=total
            ),
        )
    else:
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=total)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    steps, losses, norms = 0, [], []
    start_epoch, skip = 0, 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        steps = int(os.path.basename(args.resume_from_checkpoint).removeprefix("step_"))
        start_epoch, skip = divmod(steps * args.gradient_accumulation_steps, len(loader))
    for epoch in range(start_epoch, args.epochs):
        model.train()
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, skip) if epoch == start_epoch and skip else loader
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).float().mean().item())
            if accelerator.sync_gradients:
                steps += 1
                if steps == args.save_at:
                    accelerator.save_state(os.path.join(args.output_dir, f"step_{steps}"))
    model.eval()
    with torch.no_grad():
        found = [
            accelerator.gather_for_metrics(model(**batch).loss.repeat(4))
            for batch in accelerator.prepare(DataLoader(Examples(args.model, 8, seed=1), batch_size=4))
        ]
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        os.path.join(args.output_dir, "model"),
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        with open(os.path.join(args.output_dir, "results.json"), "w") as file:
            json.dump({"losses": losses, "norms": norms, "eval": torch.cat(found).float().mean().item()}, file)
    accelerator.end_training()


if __name__ == "__main__":
    main()
