"""`deepspeed.zero` at stage 3: attributes of sharded parameters, gathering, construction, and the state by parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import run_outcomes, run_ranks
from models import CASES, SEED, build
from variants import ADAMW, BLOCKS, DTYPES, STAGE_3, config, digest, micro_step, start, train, values, whole

VARIANT = STAGE_3[0]


def attributes() -> dict[str, bool]:
    import deepspeed

    model = build(CASES["tied and frozen"])
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = {name: p for name, p in model.named_parameters()}
    engine = start(config(VARIANT), model)
    parameters = dict(engine.module.named_parameters())
    world, rank = engine.world_size, engine.global_rank

    def shard(value: torch.Tensor) -> torch.Tensor:
        part = -(-value.numel() // world)
        return value.flatten()[rank * part : (rank + 1) * part]

    return {
        "the same objects": all(parameters[name] is p for name, p in ours.items()) and len(parameters) == len(ours),
        "ids": len({p.ds_id for p in parameters.values()}) == len(parameters),
        "shapes": all(tuple(p.ds_shape) == tuple(plain[name].shape) for name, p in parameters.items()),
        "numel": all(p.ds_numel == plain[name].numel() for name, p in parameters.items()),
        "part": all(p.partition_numel() == -(-p.ds_numel // world) for p in parameters.values()),
        "shard": all(torch.equal(p.ds_tensor, shard(plain[name])) for name, p in parameters.items()),
        "summary": all(p.ds_summary()["ds_numel"] == p.ds_numel for p in parameters.values()),
        # On one host all ranks see the one copy, at any time.
        "whole": {p.ds_status for p in parameters.values()} == {deepspeed.zero.ZeroParamStatus.AVAILABLE},
        "values": all(torch.equal(parameters[name], value) for name, value in plain.items()),
        "gradients": all(p.requires_grad == ours[name].requires_grad for name, p in parameters.items()),
        "tied": engine.module.head.weight is engine.module.embedding.weight,
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_attributes_that_clients_read(world: int) -> None:
    for found in run_ranks(attributes, world):
        assert all(found.values()), found


def gathering() -> dict[str, Any]:
    import deepspeed

    engine = start(config(VARIANT), build(CASES["gpt"]))
    module, out = engine.module, {}
    weight = module.blocks[0].up.weight
    with deepspeed.zero.GatheredParameters(weight):
        before = weight.detach().clone()
        out["whole"] = tuple(weight.shape) == tuple(weight.ds_shape)
    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=1):
        if engine.global_rank == 1:
            with torch.no_grad():
                weight.mul_(2)
                module.norm.weight.fill_(0.5)
    with deepspeed.zero.GatheredParameters(module.parameters()):
        out["written"] = torch.equal(weight, before * 2) and bool((module.norm.weight == 0.5).all())
    plain = torch.nn.Parameter(torch.ones(2))
    with (
        deepspeed.zero.GatheredParameters([weight, plain], modifier_rank=0),
        deepspeed.zero.GatheredParameters([weight]),
    ):
        out["nested"] = weight.numel() == weight.ds_numel
    with deepspeed.zero.GatheredParameters([plain], modifier_rank=0), torch.no_grad():
        plain.add_(1)
    out["not sharded"] = bool((plain == 2).all())
    with torch.no_grad():
        out["loss"] = engine(*CASES["gpt"].batch(0, 0, torch.float32)[0]).item()
    # What was written is what is trained from.
    micro_step(engine, CASES["gpt"], 0, torch.float32)
    out["trained from"] = bool(((module.norm.weight - 0.5).abs() < 0.02).all())
    return out


def test_gathering_with_and_without_a_modifier() -> None:
    one, other = run_ranks(gathering, 2)
    assert one == other
    assert all(one.values()), one


def writes_without_asking() -> None:
    import deepspeed

    engine = start(config(VARIANT), build(CASES["gpt"]))
    if engine.global_rank == 1:
        with deepspeed.zero.GatheredParameters(engine.module.norm.weight), torch.no_grad():
            engine.module.norm.weight.fill_(5)
    deepspeed.comm.barrier()


def test_a_write_that_would_change_the_weights_of_others_is_refused_with_a_reason() -> None:
    _, outcome = run_outcomes(writes_without_asking, 2, deadline=60)
    assert outcome.status == "died"
    assert "GatheredParameters(parameters, modifier_rank=R)" in outcome.output


def unknown_rank() -> str:
    import deepspeed

    engine = start(config(VARIANT), build(CASES["gpt"]))
    try:
        with deepspeed.zero.GatheredParameters(engine.module.norm.weight, modifier_rank=7):
            pass
    except ValueError as error:
        return str(error)
    return ""


def test_a_modifier_that_does_not_exist_is_refused() -> None:
    assert all("ranks 0 to 1" in error for error in run_ranks(unknown_rank, 2))


def gathered_while_training(folder: str) -> dict[str, Any]:
    """Contexts around forward and backward, and a look at weights between them, change nothing."""
    out = {}
    for variant in ("2", VARIANT):
        engine = start(config(variant, folder=folder), build(CASES["gpt"]))
        seen = []
        for index in range(3):
            with whole(engine.module.blocks[0]):
                seen.append(micro_step(engine, CASES["gpt"], index, torch.float32))
            with whole(engine.module):
                seen.append(float(engine.module.blocks[1].down.weight.detach().double().sum()))
        out[variant] = (seen, digest(engine.module))
        engine.destroy()
    return out


def test_gathering_around_a_step(tmp_path: Any) -> None:
    for found in run_ranks(gathered_while_training, 2, str(tmp_path)):
        assert found[VARIANT] == found["2"]


def built_under_init(case: str, how: str, folder: str) -> tuple[Any, Any, bool]:
    """Four steps of a model built as usual, four of one built under Init, and whether that one was sharded."""
    import deepspeed

    variant = "3 all on nvme" if how in ("nvme", "config's nvme") else VARIANT
    settings = config(variant, folder=folder)
    plain = train(CASES[case], VARIANT, "fp32")
    if how == "module":
        model = build(CASES[case])
        deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    elif how == "nested":
        with deepspeed.zero.Init(config_dict_or_path=settings), deepspeed.zero.Init(config_dict_or_path=settings):
            model = build(CASES[case])
    else:
        remote_device = how if how in ("cpu", "nvme") else None
        with deepspeed.zero.Init(config_dict_or_path=settings, remote_device=remote_device, enabled=how != "disabled"):
            # With "seeds" every rank has its own: rank 0's weights count.
            model = build(CASES[case], seed=SEED + (deepspeed.comm.get_rank() if how == "seeds" else 0))
    sharded = all(hasattr(p, "ds_id") for p in model.parameters() if p.numel())
    engine = start(settings, model)
    found = {**plain, "losses": [], "norms": []}
    for index in range(4):
        found["losses"].append(micro_step(engine, CASES[case], index, torch.float32))
        found["norms"].append(engine.get_global_grad_norm())
    return plain, {**found, "weights": digest(engine.module)}, sharded


@pytest.mark.parametrize(
    ("case", "how"),
    [
        ("gpt", "context"),
        ("gpt", "seeds"),
        ("gpt", "module"),
        ("tied and frozen", "context"),
        ("reused", "nested"),
        ("lstm", "cpu"),
        ("empty", "context"),
        ("gpt", "disabled"),
        ("convolutions", "context"),
        ("gpt", "nvme"),
        ("gpt", "config's nvme"),
        ("hugging face llama", "context"),
    ],
)
def test_a_model_built_under_init_trains_like_any_other(case: str, how: str, tmp_path: Path) -> None:
    if CASES[case].requires:
        pytest.importorskip(CASES[case].requires)
    for plain, found, sharded in run_ranks(built_under_init, 2, case, how, str(tmp_path), deadline=90):
        assert sharded == (how != "disabled")
        assert found == plain


def init_then_write() -> dict[str, Any]:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config(VARIANT), dtype=torch.bfloat16):
        layer = nn.Linear(6, 3)
        with deepspeed.zero.GatheredParameters(layer.weight, modifier_rank=0):
            if deepspeed.comm.get_rank() == 0:
                nn.init.constant_(layer.weight, 0.25)
    outside = nn.Linear(2, 2)
    with whole(layer):
        return {
            "written": bool((layer.weight == 0.25).all()),
            "dtype": layer.weight.dtype is torch.bfloat16,
            "shape": tuple(layer.weight.shape) == (3, 6),
            "left": not hasattr(outside.weight, "ds_id") and outside.weight.numel() == 4,
        }


def test_weights_are_set_under_init() -> None:
    for found in run_ranks(init_then_write, 2):
        assert all(found.values()), found


def state_by_parameter(variant: str, precision: str) -> dict[str, Any]:
    from deepspeed import utils

    engine = start(config(variant, precision, gradient_clipping=0.0), build(CASES["tied and frozen"]))
    case, dtype = CASES["tied and frozen"], DTYPES[precision]
    micro_step(engine, case, 0, dtype)
    arguments, keywords = case.batch(engine.global_rank, 1, dtype)
    engine.backward(engine(*arguments, **keywords))
    out: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            out[name] = {
                "gradient": utils.safe_get_full_grad(parameter).float(),
                "fp32": utils.safe_get_full_fp32_param(parameter),
                "first": utils.safe_get_full_optimizer_state(parameter, "exp_avg"),
                "second": utils.safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
            }
    engine.step()
    return {
        name: {key: (list(v.shape), v.flatten().tolist()) for key, v in found.items()} for name, found in out.items()
    }


def plain_torch() -> dict[str, Any]:
    """The same two steps on torch's own optimizer, the ranks' batches in turn."""
    case = CASES["tied and frozen"]
    model = build(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW["params"])
    for index in range(2):
        for rank in range(2):
            arguments, keywords = case.batch(rank, index, torch.float32)
            (model(*arguments, **keywords) / 2).backward()
        if index == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {
        name: {
            "gradient": p.grad,
            "fp32": p.detach(),
            "first": optimizer.state[p]["exp_avg"],
            "second": optimizer.state[p]["exp_avg_sq"],
        }
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_gradients_masters_and_moments_by_parameter() -> None:
    expected = plain_torch()
    for found in run_ranks(state_by_parameter, 2, VARIANT, "fp32"):
        assert set(found) == set(expected)
        for name, state in expected.items():
            for key, value in state.items():
                shape, flat = found[name][key]
                assert shape == list(value.shape), (name, key)
                assert torch.allclose(torch.tensor(flat), value.flatten(), rtol=1e-4, atol=1e-7), (name, key)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_state_by_parameter_is_that_of_stage_2(precision: str) -> None:
    assert run_ranks(state_by_parameter, 2, VARIANT, precision) == run_ranks(state_by_parameter, 2, "2", precision)


def state_written() -> dict[str, Any]:
    from deepspeed import utils

    engine = start(config(VARIANT, optimizer={"type": "AdamW", "params": {"lr": 0.0}}), build(CASES["gpt"]))
    weight = engine.module.blocks[0].up.weight
    utils.safe_set_full_fp32_param(weight, torch.full(tuple(weight.ds_shape), 0.5))
    utils.safe_set_full_optimizer_state(weight, torch.full(tuple(weight.ds_shape), 0.25), "exp_avg")
    moment = utils.safe_get_full_optimizer_state(weight, "exp_avg")
    micro_step(engine, CASES["gpt"], 0, torch.float32)  # the rate is zero: the step writes the master to the weight
    with whole(engine.module):
        kept = bool((weight == 0.5).all())
    return {
        "master": bool((utils.safe_get_full_fp32_param(weight) == 0.5).all()),
        "moment": bool((moment == 0.25).all()),
        "weight": kept,
    }


def test_masters_and_moments_can_be_set() -> None:
    for found in run_ranks(state_written, 2):
        assert all(found.values()), found


def leaves() -> tuple[Any, Any]:
    import deepspeed

    def run(leaf: bool) -> Any:
        model = build(CASES["experts"])
        if leaf:
            marked = deepspeed.utils.set_z3_leaf_modules(model, [nn.ModuleList])
            assert marked and deepspeed.utils.get_z3_leaf_modules(model) == marked
        engine = start(config(VARIANT), model)
        losses = [micro_step(engine, CASES["experts"], index, torch.float32) for index in range(3)]
        return losses, digest(engine.module)

    return run(True), run(False)


def test_leaf_modules_train_the_same() -> None:
    for leaf, plain in run_ranks(leaves, 2):
        assert leaf == plain


def whole_state_dict(folder: str, flag: bool) -> dict[str, Any]:
    settings = config(VARIANT, "bf16")
    settings["zero_optimization"] = {**BLOCKS[VARIANT], "stage3_gather_16bit_weights_on_model_save": flag}
    engine = start(settings, build(CASES["tied and frozen"]))
    micro_step(engine, CASES["tied and frozen"], 0, torch.bfloat16)
    state = engine._zero3_consolidated_16bit_state_dict()
    assert engine.save_16bit_model(folder) is True
    with whole(engine.module):
        expected = {name: value.clone() for name, value in engine.module.state_dict().items()}
    if engine.global_rank != 0:
        return {"none": state is None}
    saved = torch.load(f"{folder}/pytorch_model.bin", weights_only=True)
    return {
        "state": all(torch.equal(state[name], value) for name, value in expected.items())
        and len(state) == len(expected),
        "saved": all(torch.equal(saved[name], value) for name, value in expected.items())
        and len(saved) == len(expected),
    }


@pytest.mark.parametrize("flag", [True, False])
def test_the_whole_model_on_rank_0(flag: bool, tmp_path: Any) -> None:
    """On one host nothing has to be gathered, so that the setting is not needed."""
    for found in run_ranks(whole_state_dict, 2, str(tmp_path), flag):
        assert all(found.values()), found


def weights_loaded() -> tuple[float, bool]:
    """load_module_state_dict of whole weights into a sharded model."""
    donor = build(CASES["gpt"], seed=99)
    engine = start(config(VARIANT), build(CASES["gpt"]))
    engine.load_module_state_dict(donor.state_dict())
    expected = values(donor)
    got = values(engine.module)
    micro_step(engine, CASES["gpt"], 0, torch.float32)  # the masters were loaded, too: one small step away
    return (values(engine.module) - expected).abs().max().item(), torch.equal(got, expected)


def test_whole_weights_are_loaded_into_a_sharded_model() -> None:
    for distance, equal in run_ranks(weights_loaded, 2):
        assert equal and 0 < distance < 0.05


def one_rank_gathers() -> None:
    import deepspeed

    engine = start(config(VARIANT), build(CASES["gpt"]))
    if engine.global_rank == 0:
        with deepspeed.zero.GatheredParameters(engine.module.norm.weight, modifier_rank=0):
            pass


def test_a_gathering_that_one_rank_enters_is_no_hang() -> None:
    outcomes = run_outcomes(one_rank_gathers, 2, deadline=60)
    assert all(outcome.status in ("raised", "returned") for outcome in outcomes), [o.describe() for o in outcomes]


def offloaded_and_back() -> dict[str, Any]:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    engine = start(config("3"), build(CASES["gpt"]))
    before = digest(engine.module)
    engine.offload_states(include=[OffloadStateTypeEnum.optim_states, "lp_params"])
    engine.reload_states()
    engine.empty_partition_cache()
    found = {"same": digest(engine.module) == before}
    for what, arguments in {"device": {"device": "nvme"}, "kind": {"include": ["moments"]}}.items():
        try:
            engine.offload_states(**arguments)
        except ValueError as error:
            found[what] = str(error)
    return found


def test_offload_states_of_a_model_on_the_cpu() -> None:
    for found in run_ranks(offloaded_and_back, 2):
        assert found["same"]
        assert "offload_optimizer" in found["device"]
        assert "moments" in found["kind"]
