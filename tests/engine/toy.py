"""Small models with everything that makes parameters awkward, and a training loop that reports every bit of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, LENGTH, MICRO_BATCH = 29, 18, 7, 2


class Toy(nn.Module):
    """A one-block language model: an embedding tied to the output, odd sizes, a parameter of no elements, a frozen one,
    one that no loss depends on, and an optional dropout. Returns the mean cross entropy."""

    def __init__(self, dropout: float = 0.0, unused: bool = True):
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen_scale = nn.Parameter(torch.full((WIDTH,), 1.25), requires_grad=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(LENGTH, LENGTH)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH + 1), nn.Linear(3 * WIDTH + 1, WIDTH, bias=False)
        if unused:
            self.unused = nn.Parameter(torch.ones(5))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) * self.frozen_scale
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = self.dropout(x + self.down(F.gelu(self.up(x))) + self.empty.sum())
        return F.cross_entropy(self.head(x).float().flatten(0, 1), targets.flatten())


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Regression(nn.Module):
    """Linear, batch norm, linear; returns a loss, a dict or a dataclass."""

    def __init__(self, returns: str = "loss"):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 11), nn.BatchNorm1d(11), nn.Linear(11, 1)
        self.returns = returns

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        logits = self.last(torch.tanh(self.norm(self.first(x)))).squeeze(1)
        loss = F.mse_loss(logits.float(), y.float())
        if self.returns == "dict":
            return {"loss": loss, "logits": logits}
        if self.returns == "dataclass":
            return Output(loss, logits)
        return loss


def build(make: Callable[..., nn.Module] = Toy, seed: int = 7, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    return make(**arguments)


def tokens(micro_step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of sequences x -> 3 x + 1 modulo the vocabulary."""
    generator = torch.Generator().manual_seed(1000 * micro_step + rank)
    sequence = [torch.randint(VOCABULARY, (MICRO_BATCH,), generator=generator)]
    for _ in range(LENGTH):
        sequence.append((3 * sequence[-1] + 1) % VOCABULARY)
    both = torch.stack(sequence, dim=1)
    return both[:, :-1], both[:, 1:]


def points(micro_step: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch for `Regression`."""
    generator = torch.Generator().manual_seed(1000 * micro_step + rank)
    x = torch.randn(4, 6, generator=generator)
    return x.to(dtype), x.sum(dim=1).to(dtype)


def config(stage: int = 0, precision: str = "fp32", accumulation: int = 1, **more: Any) -> dict[str, Any]:
    """A config for the toys; keys of `more` are added or, where None, removed."""
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 700},
        "gradient_clipping": 0.0,
    }
    if precision == "bf16":
        out["bf16"] = {"enabled": True}
    elif precision == "fp16":
        out["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}
    out.update(more)
    return {key: value for key, value in out.items() if value is not None}


def start(settings: dict[str, Any], model: nn.Module | None = None, **arguments: Any) -> Any:
    """An engine; everything else that `initialize` returns hangs on it."""
    import deepspeed

    torch.set_num_threads(1)
    model = model if model is not None else build()
    return deepspeed.initialize(model=model, config=settings, **arguments)[0]


def micro_step(engine: Any, index: int, make_batch: Callable[..., Any] = tokens) -> float:
    loss = engine(*make_batch(index, engine.global_rank))
    engine.backward(loss)
    engine.step()
    return loss.item()


def run(engine: Any, steps: int, first: int = 0, make_batch: Callable[..., Any] = tokens) -> dict[str, Any]:
    """Trains for `steps` micro-steps: losses of this rank, norms of the boundaries, final weights."""
    losses, norms = [], []
    for index in range(first, first + steps):
        before = engine.global_steps
        losses.append(micro_step(engine, index, make_batch))
        if engine.global_steps > before:
            norms.append(engine.get_global_grad_norm())
    return {"losses": losses, "norms": norms, "weights": digest(engine.module), "skipped": engine.skipped_steps}


def digest(module: nn.Module) -> str:
    """One number for every bit of parameters and buffers."""
    total = hashlib.sha256()
    with whole(module):
        for name, tensor in module.state_dict().items():
            total.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def whole(module: nn.Module) -> Any:
    """A context in which every parameter of `module` is whole, also where stage 3 gathers them."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


def flat(module: nn.Module) -> list[float]:
    """All weights as one list, for comparisons that allow rounding."""
    with whole(module):
        return torch.cat([p.detach().double().flatten() for p in module.parameters()]).tolist()


def apart(one: list[float], other: list[float]) -> float:
    """Largest difference relative to the largest value."""
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    assert a.shape == b.shape
    return ((a - b).abs().max() / a.abs().max()).item()
