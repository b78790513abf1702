"""A client's own optimizer, a callable, or any of torch.optim by name: the same numbers at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import run_ranks
from toy import apart, build, config, flat, micro_step, run, start, tokens

MAKERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
}
BY_NAME = {"RMSprop": {"lr": 1e-3}, "NAdam": {"lr": 1e-2}}


def with_client(name: str, stage: int, precision: str, callable_: bool = False) -> Any:
    model = build()
    maker = MAKERS[name]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = maker if callable_ else maker(parameters)
    return start(config(stage, precision, optimizer=None, gradient_clipping=0.8), model, optimizer=optimizer)


def client_at_all_stages(name: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "fp16"):
        for stage in (0, 1, 2, 3):
            engine = with_client(name, stage, precision)
            out[f"{precision} {stage}"] = run(engine, 4)
            assert type(engine.basic_optimizer) is type(MAKERS[name]([torch.nn.Parameter(torch.zeros(1))]))
            engine.destroy()
    engine = with_client(name, 2, "fp32", callable_=True)
    out["callable"] = run(engine, 4)
    return out


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_client_optimizer_gives_the_same_at_every_stage(name: str, world: int) -> None:
    results = run_ranks(client_at_all_stages, world, name, deadline=120)
    for result in results:
        for precision in ("fp32", "bf16", "fp16"):
            reference = results[0][f"{precision} 0"]
            for stage in (0, 1, 2, 3):
                found = result[f"{precision} {stage}"]
                assert found["norms"] == reference["norms"], f"{precision} stage {stage}"
                assert found["weights"] == reference["weights"], f"{precision} stage {stage}"
        assert result["callable"]["weights"] == results[0]["fp32 2"]["weights"]


def client_as_torch(stage: int) -> float:
    engine = with_client("sgd", stage, "fp32")
    run(engine, 4)
    model = build()
    optimizer = MAKERS["sgd"](model.parameters())
    for index in range(4):
        for rank in range(engine.world_size):
            (model(*tokens(index, rank)) / engine.world_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8)
        optimizer.step()
        optimizer.zero_grad()
    return apart(flat(model), flat(engine.module))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_client_optimizer_gives_the_numbers_of_plain_torch(stage: int) -> None:
    assert max(run_ranks(client_as_torch, 2, stage)) < 1e-5


def by_name_at_all_stages(kind: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            engine = start(config(stage, precision, optimizer={"type": kind, "params": BY_NAME[kind]}))
            assert type(engine.basic_optimizer) is getattr(torch.optim, kind)
            out[f"{precision} {stage}"] = run(engine, 3)
            engine.destroy()
    return out


@pytest.mark.parametrize("kind", sorted(BY_NAME))
def test_any_optimizer_of_torch_by_name(kind: str) -> None:
    results = run_ranks(by_name_at_all_stages, 2, kind)
    for precision in ("fp32", "bf16"):
        reference = results[0][f"{precision} 0"]
        for stage in (1, 2, 3):
            assert results[1][f"{precision} {stage}"]["weights"] == reference["weights"]


def parameter_groups() -> tuple[list[float], list[float], list[str]]:
    model = build()
    decay = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "lr": 0.0, "weight_decay": 0.0}]
    before = flat(model.norm)
    engine = start(config(2), model, model_parameters=groups)
    run(engine, 2)
    assert flat(model.norm) == before, "a group with rate 0 has moved"
    engine.optimizer.param_groups[1]["lr"] = 0.5
    micro_step(engine, 2)
    assert flat(model.norm) != before, "a new rate in param_groups has no effect"
    return engine.get_lr(), [g["weight_decay"] for g in engine.optimizer.param_groups], engine.get_type()


def test_parameter_groups_keep_their_options() -> None:
    for rates, decays, kinds in run_ranks(parameter_groups, 2):
        assert (rates, decays) == ([1e-2, 0.5], [0.1, 0.0])
        assert len(kinds) == 2


def schedulers(stage: int) -> dict[str, Any]:
    out: dict[str, Any] = {}

    def rates(engine: Any, steps: int = 4) -> list[float]:
        seen = []
        for index in range(steps):
            micro_step(engine, index)
            seen.append(engine.get_lr()[0])
        return seen

    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    engine = start(config(stage, optimizer=None), model, optimizer=optimizer, lr_scheduler=schedule)
    assert engine.lr_scheduler is schedule
    out["object"] = rates(engine)

    engine = start(config(stage), lr_scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1))
    out["callable"] = rates(engine)

    engine = start(config(stage, scheduler={"type": "ExponentialLR", "params": {"gamma": 0.1}}))
    out["by name"] = rates(engine)

    engine = start(config(stage, accumulation=2), lr_scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.1))
    out["accumulated"] = rates(engine)

    engine = start(
        config(
            stage,
            scheduler={
                "type": "WarmupLR",
                "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"},
            },
        )
    )
    out["own"] = rates(engine)

    # As lightning does: it steps the schedule itself.
    engine = start(config(stage), lr_scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.1))
    engine.lr_scheduler = None
    out["taken away"] = rates(engine)

    engine = start(
        config(stage, "fp16", fp16={"enabled": True, "initial_scale_power": 40, "hysteresis": 1}),
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.1),
    )
    out["skipped"] = (rates(engine, 2), engine.skipped_steps, engine.was_step_applied())
    return out


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_schedules_step_with_updates(stage: int) -> None:
    (found,) = run_ranks(schedulers, 1, stage)
    assert found["object"] == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert found["callable"] == pytest.approx([1e-2, 1e-3, 1e-3, 1e-4])
    assert found["by name"] == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])
    assert found["accumulated"] == pytest.approx([1e-2, 1e-3, 1e-3, 1e-4])
    assert found["own"] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert found["taken away"] == [1e-2] * 4
    assert found["skipped"] == ([1e-2, 1e-2], 2, False)


def with_closure() -> str:
    model = build()
    try:
        start(config(0, optimizer=None), model, optimizer=torch.optim.LBFGS(model.parameters()))
    except ValueError as error:
        return str(error)
    return ""


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    (error,) = run_ranks(with_closure, 1)
    assert "LBFGS" in error and "closure" in error
