"""Tiny models with everything that makes sharding hard, each with batches that depend on the rank and the step.

All of them are deterministic functions of a seed, and small: what is compared is bits, not quality.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Batch = tuple[tuple[Any, ...], dict[str, Any]]

VOCABULARY = 23
SEED = 11


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what it is fed.

    make      builds the model; random numbers come from torch's default generator.
    batch     (rank, step, dtype of floating-point inputs) -> (arguments, keyword arguments) of the model.
    loss      of what the model returns.
    requires  a library that must be there.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int, torch.dtype], Batch]
    loss: Callable[[Any], torch.Tensor] = lambda output: output
    requires: str | None = None


def build(case: Case, seed: int = SEED) -> nn.Module:
    torch.manual_seed(seed)
    return case.make()


def generator(rank: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(7919 * step + rank)


def sequences(rank: int, step: int, vocabulary: int = VOCABULARY, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences x -> 3 x + 1 modulo the vocabulary: inputs and, one further, targets."""
    tokens = [torch.randint(vocabulary, (2,), generator=generator(rank, step))]
    for _ in range(length):
        tokens.append((3 * tokens[-1] + 1) % vocabulary)
    both = torch.stack(tokens, dim=1)
    return both[:, :-1], both[:, 1:]


def points(rank: int, step: int, dtype: torch.dtype, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Four points and a number for each."""
    x = torch.randn(4, width, generator=generator(rank, step))
    return x.to(dtype), x.sum(dim=1)


def token_batch(rank: int, step: int, _dtype: torch.dtype) -> Batch:
    return sequences(rank, step), {}


def point_batch(rank: int, step: int, dtype: torch.dtype) -> Batch:
    return points(rank, step, dtype), {}


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


# -- the GPT of examples/gpt: its output layer uses the embedding's weight outside the embedding ------------------------


def example_gpt(width: int = 16, layers: int = 2) -> nn.Module:
    name = "deepspeed_examples_gpt_model"
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "examples" / "gpt" / "model.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].GPT(width=width, layers=layers, heads=2, max_length=16)


class Recomputed(nn.Module):
    """The GPT whose blocks are recomputed in backward: how is "reentrant", "non-reentrant" or "deepspeed"."""

    def __init__(self, how: str):
        super().__init__()
        self.gpt, self.how = example_gpt(), how
        self.dropout = nn.Dropout(0.25)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.gpt.embedding(tokens)
        cos, sin = self.gpt.cos[: tokens.shape[1]].to(x.dtype), self.gpt.sin[: tokens.shape[1]].to(x.dtype)
        for block in self.gpt.blocks:
            x = self.call(lambda x, block=block: self.dropout(block(x, cos, sin)), x)
        return token_loss(self.gpt.norm(x) @ self.gpt.embedding.weight.t(), targets)

    def call(self, function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self.how == "none":
            return function(x)
        if self.how == "deepspeed":
            import deepspeed

            return deepspeed.checkpointing.checkpoint(function, x)
        return checkpoint(function, x, use_reentrant=self.how == "reentrant")


# -- control flow ------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An LSTM whose last state goes through one of two heads; the data choose, so ranks and steps differ."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.lstm = nn.LSTM(8, 10, num_layers=2, batch_first=True)
        self.short = nn.Linear(10, 5)
        self.long = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 5))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        state = self.lstm(self.embedding(tokens))[0][:, -1]
        head = self.long if int(tokens.sum()) % 2 else self.short
        return F.cross_entropy(head(state).float(), labels)


def labelled(rank: int, step: int, _dtype: torch.dtype) -> Batch:
    tokens, _ = sequences(rank, step)
    return (tokens,), {"labels": tokens[:, 0] % 5}


class Experts(nn.Module):
    """Top-2 routing over five experts, of which the last is never chosen and others are not chosen by every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 5, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(5))
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).float()
        scores = torch.cat([scores[:, :4], torch.full_like(scores[:, 4:], -torch.inf)], dim=1)
        weights, chosen = scores.softmax(dim=1).topk(2, dim=1)
        mixed = x
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if len(rows):
                part = expert(x[rows]) * weights[rows, places, None].to(x.dtype)
                mixed = mixed.index_add(0, rows, part)
        return F.mse_loss(self.out(mixed).squeeze(1).float(), y)


# -- parameters --------------------------------------------------------------------------------------------------------


class TiedAndFrozen(nn.Module):
    """An output layer tied to the embedding, a frozen first block, a frozen norm between trained layers, and a frozen
    adapter's base whose input needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.first = nn.Sequential(nn.Linear(8, 11), nn.GELU(), nn.Linear(11, 8))
        self.second = nn.Sequential(nn.Linear(8, 11), nn.GELU(), nn.Linear(11, 8))
        self.norm = nn.LayerNorm(8)
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        for module in (self.first, self.norm, self.base):
            module.requires_grad_(False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.first(x)
        x = self.norm(x + self.second(x))
        x = x + self.base(x) + self.up(self.down(x))
        return token_loss(self.head(x), targets)


class Empty(nn.Module):
    """Parameters without elements, in a module of their own, beside others, and in a trained sum; one that is a scalar
    and one that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(5))
        self.first, self.last = nn.Linear(6, 7), nn.Linear(7, 1)
        self.no_rows = nn.Embedding(0, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        none = self.no_rows(torch.zeros(0, dtype=torch.long)).sum() + self.nothing.sum()
        out = self.last(torch.tanh(self.first(x * self.scale))) + none
        return F.mse_loss(out.squeeze(1).float(), y)


class Inner(nn.Module):
    """A child that is used twice, and a parameter of its own that it uses around the child."""

    def __init__(self, shared: nn.Module):
        super().__init__()
        self.shared, self.gain = shared, nn.Parameter(torch.full((6,), 0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.shared(torch.tanh(self.shared(x)) * self.gain)) + x


class Reused(nn.Module):
    """Modules called more than once, the same module in two places, one parameter in two modules, nested modules with
    parameters at every level."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.zeros(6))
        self.inner = nn.ModuleList([Inner(shared), Inner(shared)])
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            for block in self.inner:
                x = block(x + self.bias)
        x = self.other(torch.tanh(self.one(x)))
        return F.mse_loss(self.out(x).squeeze(1).float(), y)


class Outside(nn.Module):
    """A weight that is used by another module than its owner, before the owner's own forward and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.owner, self.user = nn.Linear(6, 6), User()
        self.out = nn.Linear(6, 1)
        self.user.borrowed = [self.owner]  # a list hides the owner from the user's own modules

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.user(x))
        x = torch.tanh(self.owner(x))
        x = self.user(x) + F.linear(x, self.owner.weight, self.owner.bias)
        return F.mse_loss(self.out(x).squeeze(1).float(), y)


class User(nn.Module):
    """Adds a matrix of its own to one it borrows."""

    borrowed: list[nn.Linear]

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.eye(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.own + self.borrowed[0].weight)


def registered() -> nn.Module:
    """`Outside`, that says so as the original asks for it."""
    import deepspeed

    model = Outside()
    for user in (model, model.user):
        deepspeed.zero.register_external_parameter(user, model.owner.weight)
    return model


# -- what modules return -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    note: str
    extra: dict[str, Any]


class Returns(nn.Module):
    """A block that returns its result in a container."""

    def __init__(self, how: str):
        super().__init__()
        self.layer, self.how = nn.Linear(6, 6), how

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> Any:
        y = torch.tanh(self.layer(x))
        if self.how == "dict":
            return {"hidden": y * 2 if twice else y, "twice": twice}
        if self.how == "dataclass":
            return Result(y, "a note", {"again": y})
        return ((y, None), [3, y.detach()])


class Containers(nn.Module):
    """Blocks that return a dict, a dataclass and nested tuples; the model returns `how`."""

    def __init__(self, how: str):
        super().__init__()
        self.a, self.b, self.c = Returns("dict"), Returns("dataclass"), Returns("tuple")
        self.out, self.how = nn.Linear(6, 1), how

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        result = self.b(self.a(x, twice=True)["hidden"])
        (hidden, _), _ = self.c(result.hidden + result.extra["again"])
        loss = F.mse_loss(self.out(hidden).squeeze(1).float(), y)
        if self.how == "dict":
            return {"loss": loss, "hidden": hidden}
        return Result(hidden, "the end", {"loss": loss}) if self.how == "dataclass" else (hidden, (loss,))


# -- convolutions ------------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Convolution, batch norm, depthwise convolution, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.group_norm = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.GroupNorm(2, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(images)))
        x = F.relu(self.group_norm(self.depthwise(x))).mean(dim=(2, 3))
        return F.cross_entropy(self.out(x).float(), labels)


def images(rank: int, step: int, dtype: torch.dtype) -> Batch:
    """Every other step's images are laid out channels last."""
    source = generator(rank, step)
    x = torch.randn(2, 3, 6, 6, generator=source).to(dtype)
    labels = torch.randint(4, (2,), generator=source)
    return (x.to(memory_format=torch.channels_last) if step % 2 else x, labels), {}


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def hugging_face_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2))


def hugging_face_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )


def hugging_face_batch(rank: int, step: int, _dtype: torch.dtype) -> Batch:
    tokens, _ = sequences(rank, step)
    return (), {"input_ids": tokens, "labels": tokens}


CASES: dict[str, Case] = {
    "gpt": Case(example_gpt, token_batch),
    "lstm": Case(Classifier, labelled),
    "tied and frozen": Case(TiedAndFrozen, token_batch),
    "experts": Case(Experts, point_batch),
    "convolutions": Case(Convolutions, images),
    "hugging face gpt2": Case(hugging_face_gpt2, hugging_face_batch, lambda out: out.loss, "transformers"),
    "hugging face llama": Case(hugging_face_llama, hugging_face_batch, lambda out: out.loss, "transformers"),
    "empty": Case(Empty, point_batch),
    "reused": Case(Reused, point_batch),
    "outside": Case(Outside, point_batch),
    "registered": Case(registered, point_batch),
    "returns dict": Case(lambda: Containers("dict"), point_batch, lambda out: out["loss"]),
    "returns dataclass": Case(lambda: Containers("dataclass"), point_batch, lambda out: out.extra["loss"]),
    "returns tuple": Case(lambda: Containers("tuple"), point_batch, lambda out: out[1][0]),
    "recomputed": Case(lambda: Recomputed("non-reentrant"), token_batch),
    "recomputed, reentrant": Case(lambda: Recomputed("reentrant"), token_batch),
    "recomputed, deepspeed": Case(lambda: Recomputed("deepspeed"), token_batch),
    "not recomputed": Case(lambda: Recomputed("none"), token_batch),
}
