"""An optimizer that already holds state when the engine takes it over goes on from there, at every stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from toy import apart, build, config, digest, flat, micro_step, run, start, tokens

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
}
STEPS_BEFORE = 3


def trained(name: str, world: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after some steps of plain torch on the batches of all ranks."""
    model = build(unused=False)  # the engine gives a parameter that no loss depends on zeros, plain torch nothing
    optimizer = MAKERS[name]([p for p in model.parameters() if p.requires_grad])
    plain_steps(model, optimizer, world, range(STEPS_BEFORE))
    return model, optimizer


def plain_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: int, indices: range) -> None:
    for index in indices:
        for rank in range(world):
            (model(*tokens(index, rank)) / world).backward()
        optimizer.step()
        optimizer.zero_grad()


def take_over(name: str, stage: int, precision: str, reload: bool) -> Any:
    world = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    model, optimizer = trained(name, world)
    if reload:
        fresh = MAKERS[name]([p for p in model.parameters() if p.requires_grad])
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
    return start(config(stage, precision, optimizer=None), model, optimizer=optimizer)


def go_on(name: str, reload: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2):
            engine = take_over(name, stage, precision, reload)
            result = run(engine, 3, first=STEPS_BEFORE)
            out[f"{precision} {stage}"] = result["weights"], flat(engine.module)
            engine.destroy()
    model, optimizer = trained(name, int(os.environ["WORLD_SIZE"]))
    plain_steps(model, optimizer, int(os.environ["WORLD_SIZE"]), range(STEPS_BEFORE, STEPS_BEFORE + 3))
    out["plain"] = flat(model)
    without = start(config(2, optimizer=None), trained(name, 1)[0], optimizer=MAKERS[name])
    run(without, 3, first=STEPS_BEFORE)
    out["without"] = flat(without.module)
    return out


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_state_from_before_initialize_is_carried_on(name: str, world: int) -> None:
    for found in run_ranks(go_on, world, name, world == 2, deadline=120):
        for precision in ("fp32", "bf16"):
            for stage in (1, 2):
                assert found[f"{precision} {stage}"][0] == found[f"{precision} 0"][0], f"{precision} stage {stage}"
        assert apart(found["plain"], found["fp32 2"][1]) < 1e-5
        assert apart(found["plain"], found["bf16 2"][1]) < 2e-2
        assert apart(found["plain"], found["without"]) > 1e-3, "the state makes no difference in this test"


def save_and_resume(folder: str) -> tuple[str, str]:
    engine = take_over("adamw", 2, "bf16", True)
    micro_step(engine, STEPS_BEFORE)
    engine.save_checkpoint(folder, "carried")
    micro_step(engine, STEPS_BEFORE + 1)
    model = build(seed=9, unused=False)
    optimizer = MAKERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    other = start(config(1, "bf16", optimizer=None), model, optimizer=optimizer)
    other.load_checkpoint(folder, "carried")
    micro_step(other, STEPS_BEFORE + 1)
    return digest(engine.module), digest(other.module)


def test_carried_state_is_in_checkpoints(tmp_path: Path) -> None:
    for one, other in run_ranks(save_and_resume, 2, str(tmp_path)):
        assert one == other


def refusals() -> dict[str, str]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    found = {}
    model = build(torch.nn.Linear, in_features=6, out_features=5)
    ours, factored = DeepSpeedCPUAdam(model.parameters()), torch.optim.Adafactor(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    ours.step()
    factored.step()
    model.zero_grad()
    for name, optimizer in (("ours", ours), ("factored", factored)):
        try:
            start(config(2, optimizer=None, zero_allow_untested_optimizer=True), model, optimizer=optimizer)
        except ValueError as error:
            found[name] = str(error)
    assert start(config(0, optimizer=None), model, optimizer=factored).global_steps == 0
    return found


def test_state_that_cannot_be_carried_is_refused() -> None:
    for found in run_ranks(refusals, 2):
        assert "DeepSpeedCPUAdam came with state" in found["ours"] and "torch.optim" in found["ours"]
        assert "cannot be cut into shards" in found["factored"] and "ZeRO stage 0" in found["factored"]


def different_states() -> str:
    model = build()
    optimizer = MAKERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    if os.environ["RANK"] == "1":
        plain_steps(model, optimizer, 1, range(1))
    try:
        start(config(1, optimizer=None), model, optimizer=optimizer)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_different_states_are_told() -> None:
    for error in run_ranks(different_states, 2):
        assert "ranks disagree on the optimizer's state" in error, error
