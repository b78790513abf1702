"""Lightning Fabric with DeepSpeed, as its documentation has it."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from cpu_as_cuda import FabricCpu
from tiny_models import Examples, build, fill


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama")
    parser.add_argument("--strategy", default="deepspeed_stage_2")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the middle of the epoch, from a checkpoint")
    args = parser.parse_args()
    fabric = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else FabricCpu(),
        devices=args.devices,
        strategy=args.strategy,
        precision=args.precision,
    )
    fabric.launch()
    fabric.seed_everything(7)
    with fabric.init_module():
        model = build(args.model)
        fill(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    model.mark_forward_method("generate")
    loader = fabric.setup_dataloaders(DataLoader(Examples(args.model, 64), batch_size=4))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    if args.resume:
        fabric.load("checkpoint", state)
    losses: list[float] = []
    for index, batch in enumerate(loader):
        if index < state["step"]:
            continue
        loss = model(**batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_gather(loss.detach()).float().mean().item())
        state["step"] += 1
        if state["step"] == 4 and not args.resume:
            fabric.save("checkpoint", state)
    if fabric.is_global_zero:
        os.makedirs("out", exist_ok=True)
        with open(os.path.join("out", "results.json"), "w") as file:
            json.dump({"losses": losses}, file)


if __name__ == "__main__":
    main()
