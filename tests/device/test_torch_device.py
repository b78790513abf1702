"""The engine on torch's operations: forced onto CPU tensors, it trains as the CPU engine does, the same at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import variants
from harness import run_outcomes, run_ranks
from models import CASES
from toy import build, config, micro_step, run, start
from variants import digest, whole

PRECISIONS = ("fp32", "bf16", "fp16")
# Relative differences to the CPU engine: sums and updates in other orders, amplified by the updates.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
FORCED = {"DS_TORCH_DEVICE": "1"}
STEPS = 6


def stages(backend: str | None, wanted: tuple[int, ...], **more: Any) -> dict[str, Any]:
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    out: dict[str, Any] = {}
    for precision in PRECISIONS:
        for stage in wanted:
            engine = start(config(stage, precision, gradient_clipping=0.7, **more))
            found = run(engine, STEPS)
            found |= {"weights": digest(engine.module), "summary": engine._native.summary()}
            out[f"{precision} {stage}"] = found
            engine.destroy()
    return out


def assert_close(found: dict[str, Any], expected: dict[str, Any], precision: str) -> None:
    tolerance = TOLERANCES[precision]
    assert found["skipped"] == expected["skipped"]
    for what in ("losses", "norms"):
        for step, (a, b) in enumerate(zip(found[what], expected[what], strict=True)):
            assert abs(a - b) <= tolerance * max(abs(b), 0.1), f"{what}, step {step}: {a} and {b}"


@pytest.mark.parametrize(("world", "backend"), [(1, None), (2, None), (2, "cpu:gloo")])
def test_stages_are_bit_identical_and_agree_with_the_cpu(world: int, backend: str | None) -> None:
    wanted = (0, 1, 2, 3)
    found = run_ranks(stages, world, backend, wanted, env=FORCED, deadline=180)
    expected = run_ranks(stages, world, None, (0,), deadline=120)
    for rank in range(world):
        for precision in PRECISIONS:
            reference = found[rank][f"{precision} 0"]
            assert "by torch" in reference["summary"]
            assert len(reference["norms"]) == STEPS
            assert_close(reference, expected[rank][f"{precision} 0"], precision)
            for stage in wanted:
                other = found[rank][f"{precision} {stage}"]
                for what in ("losses", "norms", "weights"):
                    assert other[what] == reference[what], f"{precision} stage {stage}: {what}"
                assert other["weights"] == found[0][f"{precision} 0"]["weights"]


def offloaded(names: tuple[str, ...], folder: str) -> dict[str, Any]:
    return {
        f"{name} {precision}": variants.train(CASES["gpt"], name, precision, folder, gradient_clipping=0.0)
        for name in names
        for precision in ("fp32", "bf16")
    }


def test_state_on_the_host_is_updated_by_the_cpu_engine_itself(tmp_path: Any) -> None:
    names = ("2 optimizer on cpu", "3 all on cpu", "3 optimizer on nvme", "3 all on nvme")
    found = run_ranks(offloaded, 2, names, str(tmp_path), env=FORCED, deadline=120)
    expected = run_ranks(offloaded, 2, ("0",), str(tmp_path), deadline=60)
    for rank in range(2):
        for precision in ("fp32", "bf16"):
            reference = expected[rank][f"0 {precision}"]
            for name in names:
                for what in ("losses", "weights"):
                    assert found[rank][f"{name} {precision}"][what] == reference[what], f"{name} {precision}: {what}"


def weights_away(folder: str, backend: str | None) -> dict[str, Any]:
    """Stage 3 with its weights on the device, in the host's memory and on the disk, updated by the device."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return {
        f"{precision} {name}": variants.train(CASES["tied and frozen"], name, precision, folder)
        for precision in ("fp32", "bf16")
        for name in ("3", "3 weights on cpu", "3 weights on nvme")
    }


@pytest.mark.parametrize("backend", [None, "cpu:gloo"])
def test_where_the_weights_wait_changes_no_bit(backend: str | None, tmp_path: Any) -> None:
    for found in run_ranks(weights_away, 2, str(tmp_path), backend, env=FORCED, deadline=120):
        for precision in ("fp32", "bf16"):
            reference = found[f"{precision} 3"]
            assert reference["moved"]
            assert found[f"{precision} 3 weights on cpu"] == reference
            assert found[f"{precision} 3 weights on nvme"] == reference


def shared_out(ratio: float, optimizer: dict[str, Any], client: bool, device: str, folder: str) -> dict[str, Any]:
    """Two updates with a part of the state on the host, or on its disk; what is in which unit."""
    away = {"device": device, "ratio": ratio, **({"nvme_path": folder} if device == "nvme" else {})}
    zero = {"stage": 3, "reduce_bucket_size": 700, **({"offload_optimizer": away} if ratio else {})}
    settings = config(3, zero_optimization=zero, optimizer=None if client else optimizer)
    model = build()
    engine = start(settings, model, **({"optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)} if client else {}))
    weights = []
    for index in range(2):
        micro_step(engine, index)
        with whole(engine.module):
            weights.append({name: p.detach().clone() for name, p in engine.module.named_parameters()})
    engine.save_checkpoint(folder, f"{ratio} {optimizer['type']} {client} {device}")
    units = [[engine._trained.names[index] for index in unit] for unit in engine._native.units()]
    engine.destroy()
    return {"weights": weights, "units": units}


@pytest.mark.parametrize(
    ("kind", "client", "device"),
    [("AdamW", False, "cpu"), ("AdamW", False, "nvme"), ("Lamb", False, "nvme"), ("AdamW", True, "cpu")],
)
def test_a_part_of_the_state_may_be_on_the_host(kind: str, client: bool, device: str, tmp_path: Any) -> None:
    optimizer = {"type": kind, "params": {"lr": 1e-2}}
    arguments = (optimizer, client, device, str(tmp_path))
    none, half, all_of_it = (
        run_ranks(shared_out, 2, ratio, *arguments, env=FORCED, deadline=60)[0] for ratio in (0.0, 0.5, 1.0)
    )
    # In the first step gradients are the same whoever updates, so each unit has the weights of whoever updates it.
    after = half["weights"][0]
    at_host = [all(torch.equal(after[n], all_of_it["weights"][0][n]) for n in unit) for unit in half["units"]]
    on_device = [all(torch.equal(after[n], none["weights"][0][n]) for n in unit) for unit in half["units"]]
    assert all(host or device for host, device in zip(at_host, on_device, strict=True))
    if not client:  # torch's optimizer computes the same on both
        assert not all(at_host) and not all(on_device), "both have updated something"
        assert all(on_device[at_host.index(False) :]), "the first units are on the host"
    for name, value in half["weights"][1].items():
        assert torch.allclose(value, none["weights"][1][name], atol=1e-4), name


OPTIMIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Adam", {"lr": 1e-2, "adam_w_mode": False, "weight_decay": 0.1}),
    ("AdamW", {"lr": 1e-2, "bias_correction": False, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e-2, "adam_w_mode": False, "bias_correction": False, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adagrad", {"lr": 1e-2, "lr_decay": 0.1}),
    ("Lion", {"lr": 1e-3, "weight_decay": 0.1}),
    ("Lamb", {"lr": 1e-2, "weight_decay": 0.01}),
)


def with_each_optimizer() -> list[dict[str, Any]]:
    out = []
    for kind, params in OPTIMIZERS:
        engine = start(config(2, "bf16", 2, optimizer={"type": kind, "params": params}, gradient_clipping=0.5))
        run(engine, 8)
        out.append({name: p.detach().float() for name, p in engine.module.named_parameters()})
        engine.destroy()
    return out


def test_every_optimizer_takes_the_steps_of_the_cpu_engine() -> None:
    found = run_ranks(with_each_optimizer, 2, env=FORCED, deadline=120)[0]
    expected = run_ranks(with_each_optimizer, 2, deadline=60)[0]
    start_from = {name: p.detach() for name, p in build().named_parameters()}
    for (kind, params), ours, theirs in zip(OPTIMIZERS, found, expected, strict=True):
        for name, p in theirs.items():
            if p.numel() > 0:
                moved = (p - start_from[name].bfloat16().float()).norm()
                # Lion steps by signs, which rounding may turn where a momentum is next to nothing.
                allowed = 0.1 if kind == "Lion" else 0.02
                assert (ours[name] - p).norm() <= allowed * moved + 1e-2 * p.norm(), f"{kind} {params}: {name}"


def saved_and_resumed(folder: str, precision: str, stage: int) -> dict[str, Any]:
    settings = config(stage, precision, gradient_clipping=0.7)
    engine = start(settings)
    run(engine, 3)
    engine.save_checkpoint(folder, "t")
    through = run(engine, 3, first=3) | {"weights": digest(engine.module)}
    engine.destroy()
    other = start(settings, build(seed=99))
    other.load_checkpoint(folder, "t")
    again = run(other, 3, first=3) | {"weights": digest(other.module)}
    other.destroy()
    return {"through": through, "again": again}


def resumed(folder: str, precision: str) -> dict[str, Any]:
    engine = start(config(1, precision, gradient_clipping=0.7), build(seed=98))
    engine.load_checkpoint(folder, "t")
    return run(engine, 3, first=3)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 2), ("bf16", 3), ("fp16", 0)])
def test_a_checkpoint_resumes_on_the_device_and_off_it(precision: str, stage: int, tmp_path: Any) -> None:
    results = run_ranks(saved_and_resumed, 2, str(tmp_path), precision, stage, env=FORCED, deadline=120)
    on_cpu = run_ranks(resumed, 2, str(tmp_path), precision, deadline=60)
    for result, cpu in zip(results, on_cpu, strict=True):
        assert result["again"] == result["through"]
        assert_close(result["through"], cpu, precision)


def with_offloaded_states(stage: int) -> dict[str, Any]:
    engine = start(config(stage, "bf16"))
    for index in range(2):
        micro_step(engine, index)
    with whole(engine.module):
        before = [p.detach().clone() for p in engine.module.parameters()]
    engine.offload_states()
    moved = sum(p.untyped_storage().nbytes() for p in engine.module.parameters() if p.requires_grad)
    try:
        engine._native.load_masters()
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    engine.reload_states()
    with whole(engine.module):
        kept = all(torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True))
    return {"kept": kept, "left": moved, "error": error, **run(engine, 2, first=2)}


def without_offloading(stage: int) -> dict[str, Any]:
    engine = start(config(stage, "bf16"))
    run(engine, 2)
    return run(engine, 2, first=2)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_states_frees_the_devices_memory_until_reload(stage: int) -> None:
    (found,) = run_ranks(with_offloaded_states, 1, stage, env=FORCED)
    (expected,) = run_ranks(without_offloading, 1, stage, env=FORCED)
    assert found["kept"] and "reload_states" in found["error"]
    assert found["losses"] == expected["losses"]
    if stage < 3:
        assert found["left"] == 0


def single_parameters(stage: int, precision: str) -> dict[str, bool]:
    import deepspeed
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )
    from toy import tokens

    engine = start(config(stage, precision))
    micro_step(engine, 0)
    engine.backward(engine(*tokens(1, engine.global_rank)))
    weight = engine.module.up.weight
    ok = {"gradient": safe_get_full_grad(weight).abs().sum().item() > 0}
    value = torch.linspace(-1, 1, 55 * 18).view(55, 18)
    safe_set_full_fp32_param(weight, value)
    safe_set_full_optimizer_state(weight, value.abs(), "exp_avg_sq")
    ok["master"] = torch.equal(safe_get_full_fp32_param(weight), value)
    ok["state"] = torch.equal(safe_get_full_optimizer_state(weight, "exp_avg_sq"), value.abs())
    ok["local"] = bool(torch.isin(safe_get_local_fp32_param(weight), value).all())
    with whole(engine.module):
        ok["weight"] = torch.equal(weight.detach().float(), value.to(weight.dtype).float())
    engine.step()
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if engine.global_rank == 0 or stage < 3:
            weight.data.fill_(0.25)
    with whole(engine.module):
        ok["written"] = bool((weight == 0.25).all())
    if stage == 3:
        ok["master written"] = bool((safe_get_full_fp32_param(weight).to(weight.dtype) == 0.25).all())
    micro_step(engine, 2)
    return ok


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "bf16"), (3, "fp32")])
def test_single_parameters_can_be_read_and_written(stage: int, precision: str) -> None:
    for found in run_ranks(single_parameters, 2, stage, precision, env=FORCED):
        assert all(found.values()), found


class Chosen(torch.nn.Module):
    """Two equal experts, one for each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        return self.experts[rank](x).square().mean()


def apart(leaf: bool) -> list[float]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="cpu:gloo", verbose=False)
    torch.manual_seed(0)
    model = Chosen()
    if leaf:
        deepspeed.utils.set_z3_leaf_modules(model, [Chosen])
    engine = start(variants.config("3"), model)
    losses = []
    for _ in range(2):
        loss = engine(engine.global_rank, torch.ones(2, 32))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_ranks_that_compute_with_each_others_units_are_told() -> None:
    """The transport moves what it is given: two units of one size go together without an error of its own."""
    outcomes = run_outcomes(apart, 2, False, env=FORCED)
    assert all("set_z3_leaf_modules" in outcome.error for outcome in outcomes), [it.describe() for it in outcomes]
    for losses in run_ranks(apart, 2, True, env=FORCED):
        assert losses[1] < losses[0]
