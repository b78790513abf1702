"""What the page takes for granted: a model that returns its loss, a data loader, and the script's arguments."""

from __future__ import annotations

import argparse
import os

import torch
from torch import nn

import deepspeed


class Model(nn.Module):
    """Learns whether the sum of a vector is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        dtype = self.layers[0].weight.dtype
        return nn.functional.cross_entropy(self.layers(x.to(dtype)).float(), y)


class Loader:
    """Batches of 4 samples, other ones on each rank."""

    def __init__(self, batches: int):
        self.batches, self.first = batches, 0

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self):
        rank = int(os.environ.get("RANK", "0"))
        for index in range(self.first, self.batches):
            generator = torch.Generator().manual_seed(1000 * index + rank)
            x = torch.randn(4, 10, generator=generator)
            yield x, (x.sum(dim=1) > 0).long()


def dataloader_to_step(data_loader: Loader, step: int) -> None:
    data_loader.first = step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--load_dir")
    parser.add_argument("--save_dir")
    parser.add_argument("--ckpt_id")
    parser.add_argument("--save_interval", type=int, default=2)
    return deepspeed.add_config_arguments(parser).parse_args()


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return Model()
