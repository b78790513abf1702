"""What ranks may do differently from each other, and from one step to the next: the numbers stay, nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import run_outcomes, run_ranks
from models import CASES, Case, build, point_batch, points, sequences, token_loss
from variants import STAGE_3, VARIANTS, config, digest, micro_step, start

REFERENCE, *OTHERS = VARIANTS


class Branches(nn.Module):
    """Layers used in an order that the caller gives; some may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        for index in order:
            x = torch.tanh(self.layers[index](x))
        return F.mse_loss(self.out(x).squeeze(1).float(), y)


def ordered(order: Callable[[int, int], tuple[int, ...]]) -> Case:
    """Branches with `order(rank, step)`."""

    def batch(rank: int, step: int, dtype: torch.dtype) -> Any:
        return points(rank, step, dtype), {"order": order(rank, step)}

    return Case(Branches, batch)


ORDERS = {
    "another order each step": ordered(lambda rank, step: tuple((step + i) % 5 for i in range(5))),
    "reversed order": ordered(lambda rank, step: (0, 1, 2, 3, 4) if step % 2 else (4, 3, 2, 1, 0)),
    "fewer layers from the third step": ordered(lambda rank, step: (0, 1, 2, 3, 4) if step < 2 else (3,)),
    "one rank leaves layers out": ordered(lambda rank, step: (0, 2, 4) if rank == 1 else (0, 1, 2, 3, 4)),
    "each rank has its own order": ordered(lambda rank, step: tuple((i * (rank + 1) + step) % 5 for i in range(5))),
    "ranks share no layer": ordered(lambda rank, step: (0, 1) if rank % 2 else (2, 3)),
    "a layer many times": ordered(lambda rank, step: (0,) * (1 + rank + step) + (1,)),
}


def trained(engine: Any, case: Case, steps: int = 4) -> tuple[list[float], list[float], str]:
    losses, norms = [], []
    for index in range(steps):
        losses.append(micro_step(engine, case, index, torch.float32))
        norms.append(engine.get_global_grad_norm())
    return losses, norms, digest(engine.module)


def in_order(name: str, folder: str) -> dict[str, Any]:
    out = {}
    for variant in VARIANTS:
        engine = start(config(variant, folder=folder), build(ORDERS[name]))
        out[variant] = trained(engine, ORDERS[name])
        engine.destroy()
    return out


def assert_same(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        for variant in OTHERS:
            assert result[variant] == result[REFERENCE], f"rank {rank}, variant {variant!r}"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ORDERS)
def test_any_order_of_modules_gives_the_same_bits(name: str, world: int, tmp_path: Any) -> None:
    assert_same(run_ranks(in_order, world, name, str(tmp_path)))


def over_gloo(name: str, folder: str) -> dict[str, Any]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="cpu:gloo", timeout=timedelta(seconds=15), verbose=False)
    out = {}
    for variant in VARIANTS:
        engine = start(config(variant, folder=folder), build(ORDERS[name]))
        assert "gloo" in engine._group.transport
        out[variant] = trained(engine, ORDERS[name])
        engine.destroy()
    return out


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_of_modules_gives_the_same_bits_over_gloo(name: str, tmp_path: Any) -> None:
    """Where weights have to be sent, too: a rank that another one needs for a gathering takes part in it."""
    found = run_ranks(over_gloo, 2, name, str(tmp_path), deadline=90)
    shared = run_ranks(in_order, 2, name, str(tmp_path))
    for rank, results in enumerate(found):
        for variant, result in results.items():
            assert result == shared[rank][variant], f"rank {rank}, variant {variant!r}"


def with_evaluation(folder: str) -> dict[str, Any]:
    """Between steps: evaluation without gradients, with gradients that nobody asks for, and of parts of the model."""
    case, out = CASES["gpt"], {}
    for variant in VARIANTS:
        engine = start(config(variant, folder=folder), build(case))
        seen: list[Any] = []
        for index in range(3):
            engine.eval()
            with torch.no_grad():
                seen.append(engine(*sequences(index, 77)).item())
            with torch.inference_mode():
                seen.append(engine(*sequences(index, 78)).item())
            seen.append(engine(*sequences(index, 79)).item())  # a graph that is dropped
            with torch.no_grad():
                seen.append(engine.module(*sequences(index, 80)).item())
                seen.append(engine.module.norm(torch.ones(2, 16)).sum().item())
            engine.train()
            seen.append(engine(*sequences(index, 81)).item())  # a forward in training mode without a backward
            seen.append(micro_step(engine, case, index, torch.float32))
        out[variant] = (seen, digest(engine.module))
        engine.destroy()
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_between_steps(world: int, tmp_path: Any) -> None:
    assert_same(run_ranks(with_evaluation, world, str(tmp_path)))


def generated(engine: Any, count: int) -> list[int]:
    engine.eval()
    prompt = torch.arange(5)
    text = engine.module.generate(prompt, count, temperature=1.0, generator=torch.Generator().manual_seed(3))
    engine.train()
    return text.tolist()


def with_generation(folder: str) -> dict[str, Any]:
    """Ranks generate texts of different lengths between steps."""
    case, out = CASES["gpt"], {}
    for variant in VARIANTS:
        engine = start(config(variant, folder=folder), build(case))
        texts = []
        for index in range(2):
            micro_step(engine, case, index, torch.float32)
            texts.append(generated(engine, 2 + 5 * engine.global_rank))
        micro_step(engine, case, 2, torch.float32)
        out[variant] = (texts, digest(engine.module))
        engine.destroy()
    return out


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_generate_texts_of_different_lengths(world: int, tmp_path: Any) -> None:
    assert_same(run_ranks(with_generation, world, str(tmp_path)))


def generation_over_gloo(variant: str) -> list[int]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="cpu:gloo", timeout=timedelta(seconds=15), verbose=False)
    engine = start(config(variant), build(CASES["gpt"]))
    text = generated(engine, 2 + 5 * engine.global_rank)
    micro_step(engine, CASES["gpt"], 0, torch.float32)
    return text


def test_generation_of_different_lengths_gets_an_answer_over_gloo() -> None:
    """Without gradients nobody knows how long the others go on: both ranks are told what each of them wants to gather."""
    outcomes = run_outcomes(generation_over_gloo, 2, STAGE_3[0], deadline=60)
    assert [outcome.status for outcome in outcomes] == ["raised", "raised"], [o.describe() for o in outcomes]
    for outcome in outcomes:
        assert "ranks disagree" in outcome.error and "weights of unit" in outcome.error


class Parts(nn.Module):
    """Two outputs of which a loss may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.common(x))
        return self.one(x).mean(), self.other(x).square().mean()


def backward_in_many_ways(folder: str) -> dict[str, Any]:
    """Half of the outputs, two forwards for one backward, an input that needs a gradient, a gradient taken aside with
    autograd.grad, and a forward that raises."""
    out = {}
    for variant in VARIANTS:
        engine = start(config(variant, folder=folder), build(Case(Parts, point_batch)))
        x = points(engine.global_rank, 0, torch.float32)[0]
        seen: list[Any] = []

        def step(loss: torch.Tensor, engine: Any = engine, seen: list[Any] = seen) -> None:
            engine.backward(loss)
            engine.step()
            seen.append((loss.item(), engine.get_global_grad_norm()))

        step(engine(x)[engine.global_rank % 2])
        step(engine(x)[0] + engine(2 * x)[1])
        needing = x.clone().requires_grad_()
        step(sum(engine(needing)))
        seen.append(needing.grad.tolist())
        needing = x.clone().requires_grad_()
        aside = engine.module(needing)[1]
        seen.append(torch.autograd.grad(aside, needing)[0].tolist())
        try:
            engine(torch.ones(2, 5))
        except RuntimeError as error:
            seen.append("shapes" in str(error))
        step(sum(engine(x)))
        out[variant] = (seen, digest(engine.module))
        engine.destroy()
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_backward_in_many_ways(world: int, tmp_path: Any) -> None:
    results = run_ranks(backward_in_many_ways, world, str(tmp_path))
    assert_same(results)
    assert True in results[0][REFERENCE][0]


def retained(folder: str) -> dict[str, Any]:
    """Two backward passes through one graph in one accumulation."""
    out = {}
    for variant in VARIANTS:
        settings = config(variant, folder=folder, gradient_accumulation_steps=2)
        engine = start(settings, build(Case(Parts, point_batch)))
        for index in range(2):
            one, other = engine(points(engine.global_rank, index, torch.float32)[0])
            engine.backward(one + other, retain_graph=True)
            engine.step()
            engine.backward(one + other)
            engine.step()
        out[variant] = (engine.get_global_grad_norm(), digest(engine.module))
        engine.destroy()
    return out


def test_a_graph_may_be_retained(tmp_path: Any) -> None:
    assert_same(run_ranks(retained, 2, str(tmp_path)))


def logits_then_loss(folder: str) -> dict[str, Any]:
    """The loss is computed outside the module, from logits."""
    out = {}
    for variant in VARIANTS:
        engine = start(config(variant, folder=folder), build(CASES["gpt"]))
        seen = []
        for index in range(3):
            inputs, targets = sequences(engine.global_rank, index)
            loss = token_loss(engine(inputs), targets)
            engine.backward(loss)
            engine.step()
            seen.append((loss.item(), engine.get_global_grad_norm()))
        out[variant] = (seen, digest(engine.module))
        engine.destroy()
    return out


def test_a_loss_outside_the_module(tmp_path: Any) -> None:
    assert_same(run_ranks(logits_then_loss, 2, str(tmp_path)))
