"""Losses, norms and weights do not depend on the ZeRO stage, nor on what carries the gradients."""

from __future__ import annotations

from typing import Any

import pytest

from harness import run_ranks
from toy import apart, build, config, flat, micro_step, run, start

PRECISIONS = ("fp32", "bf16", "fp16")


STAGES = (0, 1, 2, 3)


def all_stages(backend: str | None, stages: tuple[int, ...] = STAGES) -> dict[str, Any]:
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    out: dict[str, Any] = {"transport": None}
    for precision in PRECISIONS:
        for stage in stages:
            engine = start(config(stage, precision, gradient_clipping=0.7))
            out["transport"] = engine._group.transport
            out[f"{precision} {stage}"] = run(engine, 6)
            engine.destroy()
    return out


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_stages_are_bit_identical(world: int) -> None:
    shared = run_ranks(all_stages, world, None, deadline=120)
    for precision in PRECISIONS:
        reference = shared[0][f"{precision} 0"]
        assert len(reference["norms"]) == 6
        assert reference["losses"][-1] < reference["losses"][0]
        for result in shared:
            for stage in STAGES:
                found = result[f"{precision} {stage}"]
                assert found["norms"] == reference["norms"], f"{precision} stage {stage}"
                assert found["weights"] == reference["weights"], f"{precision} stage {stage}"
                assert found["losses"] == result[f"{precision} 0"]["losses"], f"{precision} stage {stage}"
    if world > 1:
        assert "shared memory" in shared[0]["transport"]


@pytest.mark.parametrize("world", [2, 3])
def test_gloo_gives_the_bits_of_shared_memory(world: int) -> None:
    shared = run_ranks(all_stages, world, None, (0, 1, 2), deadline=120)
    gloo = run_ranks(all_stages, world, "cpu:gloo", (0, 1, 2), deadline=120)
    for rank in range(world):
        assert "gloo" in gloo[rank].pop("transport")
        assert shared[rank].pop("transport") == "shared memory"
        for case, found in gloo[rank].items():
            assert found == shared[rank][case], case


def accumulate() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for precision in PRECISIONS:
        for stage in STAGES:
            engine = start(config(stage, precision, accumulation=3))
            found = run(engine, 9)
            out[f"{precision} {stage}"] = (found["norms"], flat(engine.module), engine.global_steps, engine.micro_steps)
            engine.destroy()
    return out


@pytest.mark.parametrize("world", [1, 3])
def test_accumulation_agrees_among_stages(world: int) -> None:
    results = run_ranks(accumulate, world, deadline=120)
    for precision in PRECISIONS:
        norms, weights, steps, micro_steps = results[0][f"{precision} 0"]
        assert (len(norms), steps, micro_steps) == (3, 3, 9)
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        for result in results:
            for stage in STAGES:
                found = result[f"{precision} {stage}"]
                assert apart(norms, found[0]) < (1e-6 if precision == "fp32" else 1e-3), f"{precision} stage {stage}"
                assert apart(weights, found[1]) < tolerance, f"{precision} stage {stage}"


def accumulate_as_one() -> dict[str, Any]:
    """Two ranks x 3 micro-batches, and the same six micro-batches on a world of one, on plain torch."""
    import torch

    engine = start(config(2, accumulation=3, gradient_clipping=0.5, optimizer={"type": "SGD", "params": {"lr": 0.1}}))
    norms = run(engine, 6)["norms"]
    ours = flat(engine.module)

    from toy import tokens

    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    theirs = []
    for step in range(2):
        for index in range(3 * step, 3 * step + 3):
            for rank in range(engine.world_size):
                (model(*tokens(index, rank)) / (3 * engine.world_size)).backward()
        theirs.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": apart(theirs, norms), "weights": apart(flat(model), ours), "clipped": max(theirs) > 0.5}


def test_the_numbers_are_those_of_plain_torch() -> None:
    for result in run_ranks(accumulate_as_one, 2):
        assert result["clipped"]
        assert result["norms"] < 1e-5
        assert result["weights"] < 1e-5


def direct_backward(stage: int, precision: str, accumulation: int) -> tuple[Any, Any]:
    engine = start(config(stage, precision, accumulation, gradient_clipping=1.0))
    through_engine = run(engine, 4)
    engine.destroy()
    engine = start(config(stage, precision, accumulation, gradient_clipping=1.0))
    norms = []
    from toy import tokens

    for index in range(4):
        loss = engine(*tokens(index, engine.global_rank))
        (engine.scale(loss) if precision == "fp16" else loss).backward()
        engine.step()
        norms.append(engine.get_global_grad_norm())
    direct = {"norms": [n for i, n in enumerate(norms) if (i + 1) % accumulation == 0], "weights": flat(engine.module)}
    reference = start(config(stage, precision, accumulation, gradient_clipping=1.0))
    for index in range(4):
        micro_step(reference, index)
    return (through_engine["norms"], flat(reference.module)), (direct["norms"], direct["weights"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_calling_backward_on_the_loss_gives_the_same(stage: int) -> None:
    for precision, accumulation in (("fp32", 1), ("fp32", 2), ("bf16", 1), ("fp16", 2)):
        for (norms, weights), direct in run_ranks(direct_backward, 2, stage, precision, accumulation):
            close = 1e-5 if precision == "fp32" else 2e-2
            assert apart(norms, direct[0]) < close, (precision, accumulation)
            assert apart(weights, direct[1]) < close, (precision, accumulation)


def no_sync_run(stage: int) -> tuple[float, float]:
    """Two micro-batches, the first under no_sync, against accumulation by the config."""
    from toy import tokens

    engine = start(config(stage, accumulation=2))
    run(engine, 4)
    reference = flat(engine.module)
    engine.destroy()
    other = start(config(stage, accumulation=2))
    for step in range(2):
        with other.no_sync():
            other.backward(other(*tokens(2 * step, other.global_rank)))
            assert not other.is_gradient_accumulation_boundary()
        other.set_gradient_accumulation_boundary(True)
        other.backward(other(*tokens(2 * step + 1, other.global_rank)))
        other.step()
    return apart(reference, flat(other.module)), other.global_steps


@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync_accumulates_alone(stage: int) -> None:
    for difference, steps in run_ranks(no_sync_run, 2, stage):
        assert difference < 1e-5
        assert steps == 2


def no_sync_at_stage_2() -> str:
    engine = start(config(2))
    try:
        with engine.no_sync():
            pass
    except AssertionError as error:
        return str(error)
    return ""


def step_inside_no_sync() -> str:
    engine = start(config(1))
    from toy import tokens

    try:
        with engine.no_sync():
            engine.backward(engine(*tokens(0, 0)))
            engine.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_no_sync_says_where_it_cannot_be() -> None:
    assert "no_sync() is not possible at ZeRO stage 2" in run_ranks(no_sync_at_stage_2, 1)[0]
    assert "no_sync" in run_ranks(step_inside_no_sync, 1)[0]


def accelerates_way(stage: int) -> tuple[float, int, int]:
    """As accelerate drives an engine: boundaries set by hand, step() only there, losses already divided."""
    from toy import tokens

    engine = start(config(stage, accumulation=2))
    run(engine, 4)
    reference = flat(engine.module)
    engine.destroy()
    other = start(config(stage, accumulation=2))
    for index in range(4):
        last = index % 2 == 1
        other.set_gradient_accumulation_boundary(is_boundary=last)
        other.backward(other(*tokens(index, other.global_rank)) / 2, scale_wrt_gas=False)
        if last:
            other.step()
    return apart(reference, flat(other.module)), other.global_steps, other.micro_steps


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_boundaries_set_by_hand(stage: int) -> None:
    for difference, steps, _ in run_ranks(accelerates_way, 2, stage):
        assert difference < 1e-5
        assert steps == 2
