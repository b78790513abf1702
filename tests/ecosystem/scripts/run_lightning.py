"""Lightning's Trainer with DeepSpeed, as its documentation has it: Trainer(strategy="deepspeed_stage_2")."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from cpu_as_cuda import TrainerCpu
from tiny_models import Examples, build, fill


class LanguageModel(L.LightningModule):
    def __init__(self, family: str, cpu_optimizer: bool):
        super().__init__()
        self.family, self.cpu_optimizer = family, cpu_optimizer
        self.model: Any = None
        self.losses: list[float] = []
        self.found: list[float] = []

    def configure_model(self) -> None:
        # At stage 3 what is made here is sharded at once.
        if self.model is None:
            self.model = build(self.family)
            fill(self.model)

    def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(self.all_gather(loss.detach()).float().mean().item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _index: int) -> None:
        self.found.append(self.all_gather(self.model(**batch).loss).float().mean().item())

    def configure_optimizers(self) -> Any:
        if self.cpu_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(self.parameters(), lr=1e-3)
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--strategy", default="deepspeed_stage_2")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--max_epochs", type=int, default=2)
    parser.add_argument("--ckpt_path")
    args = parser.parse_args()
    module = LanguageModel(args.model, cpu_optimizer="offload" in args.strategy)
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else TrainerCpu(),
        devices=args.devices,
        strategy=args.strategy,
        precision=args.precision,
        max_epochs=args.max_epochs,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(dirpath="out", filename="epoch{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=True,
    )
    trainer.fit(
        module,
        DataLoader(Examples(args.model, 32), batch_size=4),
        DataLoader(Examples(args.model, 8, seed=1), batch_size=4),
        ckpt_path=args.ckpt_path,
        weights_only=False,
    )
    if trainer.is_global_zero:
        with open(os.path.join("out", "results.json"), "w") as file:
            json.dump({"losses": module.losses, "eval": module.found[-1]}, file)


if __name__ == "__main__":
    main()
