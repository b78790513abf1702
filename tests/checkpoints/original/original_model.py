"""The model, the data and the loop of the recorded checkpoints: a few hundred parameters of every awkward kind.

The recording worker runs this file with the original, the tests run it with ours.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, LENGTH, MICRO_BATCH = 11, 5, 6, 2
BEFORE, AFTER = 3, 5


class Small(nn.Module):
    """An embedding tied to the output, a frozen layer, buffers of two dtypes, odd sizes. Returns the mean cross
    entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)
        self.register_buffer("scale", torch.tensor([1.5]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.token(inputs) * self.scale.to(self.token.weight.dtype)
        x = x + self.frozen(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(self.head(x).float().flatten(0, 1), targets.flatten())


def build(seed: int = 20) -> Small:
    torch.manual_seed(seed)
    return Small()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: the matrices, and the rest without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def client_optimizer(case: dict[str, Any], model: nn.Module) -> Any:
    """The optimizer that the script of this case builds, if it does."""
    if "client" not in case:
        return None
    module, name, arguments = case["client"]
    return getattr(importlib.import_module(module), name)(groups(model), **arguments)


def batch(micro_step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8 + 1000 * micro_step + rank)
    sequence = [torch.randint(VOCABULARY, (MICRO_BATCH,), generator=generator)]
    for _ in range(LENGTH):
        sequence.append((3 * sequence[-1] + 1) % VOCABULARY)
    both = torch.stack(sequence, dim=1)
    return both[:, :-1], both[:, 1:]


def train(engine: Any, rank: int, first: int, steps: int) -> dict[str, list[float]]:
    """`steps` updates, from micro-step `first` on: the mean loss of each, and the gradient norm."""
    accumulation = engine.gradient_accumulation_steps()
    losses, norms = [], []
    for step in range(first, first + steps):
        total = 0.0
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            loss = engine(*batch(micro_step, rank))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        losses.append(total / accumulation)
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return {"losses": losses, "norms": norms}
