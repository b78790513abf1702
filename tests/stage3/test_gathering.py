"""Stage 3 where ranks share no memory: units are gathered and released around forward and backward, over Gloo."""

from __future__ import annotations

import math
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import run_outcomes, run_ranks
from models import CASES, Case, build, point_batch, points
from variants import DTYPES, digest, micro_step, start, values, whole

# What is whole at a time: nothing longer than needed, a little of everything, whatever the defaults allow.
LIMITS: dict[str, dict[str, int]] = {
    "lean": {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    },
    "mixed": {
        "stage3_param_persistence_threshold": 9,
        "stage3_prefetch_bucket_size": 500,
        "stage3_max_live_parameters": 1500,
        "stage3_max_reuse_distance": 600,
    },
    "defaults": {},
}


def settings(stage: int, precision: str = "fp32", limits: str = "lean", **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 250, **(LIMITS[limits] if stage == 3 else {})}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "gradient_clipping": 0.7,
        "zero_optimization": {**zero, **more.pop("zero", {})},
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
        **({"fp16": {"enabled": True, "initial_scale_power": 7}} if precision == "fp16" else {}),
        **more,
    }


def over_gloo(seconds: float = 60) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="cpu:gloo", timeout=timedelta(seconds=seconds), verbose=False)


def released(engine: Any) -> bool:
    """Whether no parameter with elements is whole."""
    return all(p.numel() == 0 for p in engine.module.parameters())


def train(case: Case, config: dict[str, Any], dtype: torch.dtype = torch.float32, steps: int = 3) -> dict[str, Any]:
    engine = start(config, build(case))
    losses, norms = [], []
    for index in range(steps):
        losses.append(micro_step(engine, case, index, dtype))
        norms.append(engine.get_global_grad_norm())
        if engine.zero_optimization_stage() == 3:
            assert released(engine), "something is whole after a step"
    found = {"losses": losses, "norms": norms, "weights": digest(engine.module)}
    engine.destroy()
    return found


def compared(names: list[str], precisions: list[str]) -> dict[str, Any]:
    over_gloo()
    out: dict[str, Any] = {}
    for name in names:
        for precision in precisions:
            dtype = DTYPES[precision]
            try:
                out[f"{name}, {precision}, stage 2"] = train(CASES[name], settings(2, precision), dtype)
                for limits in LIMITS:
                    found = train(CASES[name], settings(3, precision, limits), dtype)
                    out[f"{name}, {precision}, {limits}"] = found
            except Exception as error:
                raise AssertionError(f"{name}, {precision}\n{traceback.format_exc()}") from error
    return out


GROUPS = [
    ["gpt"],
    ["tied and frozen", "empty", "convolutions"],
    ["reused", "outside", "registered"],
    ["returns dict", "returns dataclass", "returns tuple"],
    ["recomputed", "recomputed, reentrant", "recomputed, deepspeed", "not recomputed"],
]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_the_numbers_are_those_of_stage_2(names: list[str], world: int) -> None:
    precisions = ["fp32", "bf16"] if world == 2 else ["fp16"]
    for found in run_ranks(compared, world, names, precisions, deadline=180):
        for name in names:
            for precision in precisions:
                reference = found[f"{name}, {precision}, stage 2"]
                assert all(math.isfinite(loss) for loss in reference["losses"])
                for limits in LIMITS:
                    assert found[f"{name}, {precision}, {limits}"] == reference, f"{name}, {precision}, {limits}"


def in_other_loops() -> dict[str, Any]:
    """Accumulation, the client's own backward, an optimizer of the client's, and one with norms of whole parameters."""
    over_gloo()
    case, out = CASES["tied and frozen"], {}
    for stage in (2, 3):
        for name, more in {
            "accumulation": {"gradient_accumulation_steps": 2},
            "client backward": {},
            "client optimizer": {"optimizer": None, "zero_allow_untested_optimizer": True},
            "lamb": {"optimizer": {"type": "Lamb", "params": {"lr": 1e-2}}},
        }.items():
            for precision in ("fp32", "bf16"):
                model = build(case)
                trained = [p for p in model.parameters() if p.requires_grad]
                mine = {"optimizer": torch.optim.RMSprop(trained, lr=1e-3)} if name == "client optimizer" else {}
                config = {key: value for key, value in settings(stage, precision, **more).items() if value is not None}
                engine = start(config, model, **mine)
                seen = []
                for index in range(4):
                    if name == "client backward":
                        loss = engine(*case.batch(engine.global_rank, index, DTYPES[precision])[0])
                        loss.backward()
                        engine.step()
                        seen.append(loss.item())
                    else:
                        seen.append(micro_step(engine, case, index, DTYPES[precision]))
                    assert stage == 2 or released(engine), name
                out[f"{name} {precision} {stage}"] = (seen, engine.get_global_grad_norm(), digest(engine.module))
                engine.destroy()
    return out


def test_other_loops_give_the_numbers_of_stage_2() -> None:
    for found in run_ranks(in_other_loops, 2, deadline=120):
        for name in [name for name in found if name.endswith("3")]:
            assert found[name] == found[name[:-1] + "2"], name


def hugging_face() -> dict[str, Any]:
    return compared(["hugging face gpt2", "hugging face llama"], ["fp32"])


def test_hugging_face_models() -> None:
    pytest.importorskip("transformers")
    for found in run_ranks(hugging_face, 2, deadline=120):
        for name, value in found.items():
            assert value == found[f"{name.split(',')[0]}, fp32, stage 2"], name


class Deep(nn.Module):
    """Eight equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x.sum(dim=1).float(), y)


def most_whole(limits: str) -> int:
    """Elements that are whole at the same time in the third step."""
    over_gloo()
    case = Case(Deep, lambda rank, step, dtype: (points(rank, step, dtype, 16), {}))
    engine = start(settings(3, limits=limits, zero={"reduce_bucket_size": 300}), build(case))
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(engine._gather_hooks.native.live())

    for layer in engine.module.layers:
        layer.register_forward_pre_hook(look)
        layer.weight.register_post_accumulate_grad_hook(look)
    for index in range(3):
        seen.clear()
        micro_step(engine, case, index, torch.float32)
    assert len(seen) == 16
    return max(seen)


def test_no_more_is_whole_than_allowed() -> None:
    layer = 16 * 16 + 16
    assert run_ranks(most_whole, 2, "lean") == [layer, layer]
    for most in run_ranks(most_whole, 2, "mixed"):
        assert layer < most <= 1500
    assert run_ranks(most_whole, 2, "defaults") == [8 * layer, 8 * layer]


# -- control flow ------------------------------------------------------------------------------------------------------


def branches(leaf: bool) -> dict[str, Any]:
    """Ranks that take different branches."""
    over_gloo(20)
    leaves = {"leaf_module": {"classes": ["Classifier"]}} if leaf else {}
    out = {}
    for stage, zero in ((2, {}), (3, leaves)):
        out[stage] = train(CASES["lstm"], settings(stage, zero=zero), steps=4)
    return out


def test_a_rank_that_takes_another_branch_gets_an_answer() -> None:
    outcomes = run_outcomes(branches, 2, False, deadline=90)
    assert all(outcome.status == "raised" for outcome in outcomes), [outcome.describe() for outcome in outcomes]
    said = "\n".join(outcome.error for outcome in outcomes)
    assert "weights of unit" in said and "rank 0" in said and "rank 1" in said, said


def test_branches_inside_a_leaf_are_free() -> None:
    for found in run_ranks(branches, 2, True, deadline=90):
        assert found[3] == found[2]


class Ordered(nn.Module):
    """Layers in an order that the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        for index in order:
            x = torch.tanh(self.layers[index](x))
        return F.mse_loss(self.out(x).squeeze(1).float(), y)


ORDERS = ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2,), (1, 1, 1, 0), (0, 1, 2, 3, 4))
ORDERED = Case(Ordered, lambda rank, step, dtype: (points(rank, step, dtype), {"order": ORDERS[step]}))


def orders() -> dict[str, Any]:
    over_gloo()
    block = {"reduce_bucket_size": 40, "stage3_prefetch_bucket_size": 90}
    out = {"stage 2": train(ORDERED, settings(2, zero={"reduce_bucket_size": 40}), steps=len(ORDERS))}
    for limits in LIMITS:
        out[limits] = train(ORDERED, settings(3, limits=limits, zero=block), steps=len(ORDERS))
    return out


def test_another_order_of_use_in_each_step() -> None:
    for found in run_ranks(orders, 2, deadline=90):
        for limits in LIMITS:
            assert found[limits] == found["stage 2"], limits


def between_steps() -> list[Any]:
    """Evaluation, generation, calls of parts of the model, a graph that is dropped, one that is kept, a gradient taken
    aside, a forward that raises."""
    over_gloo()
    case, out = CASES["gpt"], []
    for config in (settings(2), *(settings(3, limits=limits) for limits in LIMITS)):
        engine = start(config, build(case))
        module, seen = engine.module, []
        for index in range(2):
            (tokens, targets), _ = case.batch(0, 40 + index, torch.float32)
            engine.eval()
            with torch.no_grad():
                seen.append(engine(tokens, targets).item())
                seen.append(module.norm(torch.ones(2, 16)).sum().item())
                seen.append(module.blocks[0].up(torch.ones(2, 16)).sum().item())
            with torch.inference_mode():
                seen.append(engine(tokens, targets).item())
            seen.append(module.generate(tokens[0, :3], 4, 1.0, torch.Generator().manual_seed(3)).tolist())
            seen.append(engine(tokens, targets).item())
            engine.train()
            seen.append(engine(tokens, targets).item())
            x = torch.ones(1, 3, 16, requires_grad=True)
            part = module.blocks[0].down(F.gelu(module.blocks[0].up(module.norm(x)))).square().mean()
            seen.append(torch.autograd.grad(part, x)[0].sum().item())
            try:
                engine(tokens.float(), targets)
            except (RuntimeError, IndexError) as error:
                seen.append(type(error).__name__)
            loss = engine(tokens, targets) + engine(tokens.flip(1), targets)
            engine.backward(loss, retain_graph=True)
            engine.step()
            seen.append((loss.item(), engine.get_global_grad_norm()))
            seen.append(micro_step(engine, case, index, torch.float32))
            if engine.zero_optimization_stage() == 3:
                assert released(engine)
        out.append((seen, digest(module)))
        engine.destroy()
    return out


def test_what_programs_do_between_steps() -> None:
    for reference, *found in run_ranks(between_steps, 2, deadline=120):
        assert "Error" in str(reference[0])
        assert all(it == reference for it in found), (reference, found)


# -- weights on a disk --------------------------------------------------------------------------------------------------


def from_a_disk(names: list[str], precision: str, folder: str) -> dict[str, Any]:
    """Whether weights in files of the ranks' own train, are saved and resume as those in memory."""
    over_gloo()
    out = {}
    disk = {"device": "nvme", "nvme_path": folder}
    blocks = {"lean": {"offload_param": disk}, "mixed": {"offload_param": disk, "offload_optimizer": disk}}
    for name in names:
        reference = train(CASES[name], settings(2, precision), DTYPES[precision])
        for limits, zero in blocks.items():
            found = train(CASES[name], settings(3, precision, limits, zero=zero), DTYPES[precision])
            out[f"{name}, {limits}"] = found == reference
        engine = start(settings(3, precision, zero={"offload_param": disk}), build(CASES[name]))
        micro_step(engine, CASES[name], 0, DTYPES[precision])
        engine.save_checkpoint(folder, name)
        losses = [micro_step(engine, CASES[name], index, DTYPES[precision]) for index in (1, 2)]
        ending = digest(engine.module)
        engine.destroy()
        zero = {"offload_param": disk | {"max_in_cpu": 10**9}}
        engine = start(settings(3, precision, zero=zero), build(CASES[name], seed=99))
        engine.load_checkpoint(folder, name)
        again = [micro_step(engine, CASES[name], index, DTYPES[precision]) for index in (1, 2)]
        out[f"{name} resumes"] = again == losses and digest(engine.module) == ending
        engine.destroy()
    return out


@pytest.mark.parametrize(("world", "precision"), [(2, "fp32"), (3, "bf16"), (2, "fp16")])
def test_weights_in_files_of_the_ranks_own(world: int, precision: str, tmp_path: Path) -> None:
    names = ["gpt", "tied and frozen"] if world == 2 else ["empty", "reused"]
    for found in run_ranks(from_a_disk, world, names, precision, str(tmp_path), deadline=120):
        assert all(found.values()), found


class Hidden(nn.Module):
    """A block whose second result is an attribute, whose weight is also used detached, and which returns an object that
    hides its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        self.loss = self.gate(x).square().mean()
        return Opaque(torch.tanh(self.layer(x)) @ self.layer.weight.detach())


class Opaque:
    def __init__(self, value: torch.Tensor):
        self.value = value


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.out = nn.Linear(6, 6), Hidden(), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.tanh(self.first(x))).value
        return F.mse_loss(self.out(x).squeeze(1).float(), y) + self.block.loss


def hidden() -> list[Any]:
    over_gloo()
    case = Case(Hiding, point_batch)
    return [train(case, settings(2)), *(train(case, settings(3, limits=limits)) for limits in LIMITS)]


def test_results_that_do_not_show() -> None:
    for reference, *found in run_ranks(hidden, 2, deadline=90):
        assert all(it == reference for it in found)


# -- parameters between steps ------------------------------------------------------------------------------------------


def attributes() -> dict[str, Any]:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    over_gloo()
    model = build(CASES["tied and frozen"])
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = start(settings(3), model)
    parameters = dict(engine.module.named_parameters())
    shares = {name: p.ds_tensor.clone() for name, p in parameters.items()}
    found = {
        "released": released(engine) and {p.ds_status for p in parameters.values()} == {ZeroParamStatus.NOT_AVAILABLE},
        "storage": sum(p.untyped_storage().nbytes() for p in parameters.values()) == 0,
        "shapes": all(p.ds_shape == plain[name].shape for name, p in parameters.items()),
        "numel": all(p.ds_numel == plain[name].numel() for name, p in parameters.items()),
    }
    weight = engine.module.second[0].weight
    with deepspeed.zero.GatheredParameters(weight):
        found["whole"] = torch.equal(weight, plain["second.0.weight"]) and weight.ds_status is ZeroParamStatus.AVAILABLE
        kept = weight.detach().numpy()  # holds on to the memory
        with torch.no_grad():
            weight.fill_(5)
    with (
        deepspeed.zero.GatheredParameters([weight, nn.Parameter(torch.ones(2))]),
        deepspeed.zero.GatheredParameters([weight]),
    ):
        found["forgotten"] = torch.equal(weight, plain["second.0.weight"]) and bool((kept == 5).all())
    found["released again"] = released(engine)
    with deepspeed.zero.GatheredParameters(engine.module.parameters(), modifier_rank=1), torch.no_grad():
        if engine.global_rank == 1:
            weight.mul_(2)
            engine.module.norm.bias.fill_(0.25)
    with whole(engine.module):
        found["written"] = torch.equal(weight, plain["second.0.weight"] * 2)
        found["frozen written"] = bool((engine.module.norm.bias == 0.25).all())
    state = engine.module_state_dict()
    found["state"] = torch.equal(state["second.0.weight"], plain["second.0.weight"] * 2) and set(state) == set(
        engine.module.state_dict()
    )
    into = {"other": torch.ones(1)}
    same = engine.module_state_dict(destination=into, prefix="model.") is into
    found["destination"] = same and set(into) == {"other", *("model." + name for name in state)}
    found["vars"] = engine.module_state_dict(keep_vars=True)["second.0.weight"] is weight
    weight.all_gather()
    found["method"] = weight.numel() == weight.ds_numel
    weight.partition()
    found["method again"] = weight.numel() == 0
    return {"found": found, "shares": shares, "plain": plain}


def test_attributes_gathering_and_writing() -> None:
    results = run_ranks(attributes, 2, deadline=90)
    for result in results:
        assert all(result["found"].values()), result["found"]
        for name, value in result["plain"].items():
            parts = torch.cat([rank["shares"][name] for rank in results])
            assert torch.equal(parts, value.flatten()), name


def written(precision: str) -> dict[str, Any]:
    """Weights, masters and moments set by the program count in the next step, as at stage 2."""
    import deepspeed
    from deepspeed import utils

    over_gloo()
    out = {}
    for stage in (2, 3):
        case = CASES["tied and frozen"]
        engine = start(settings(stage, precision), build(case))
        seen = [micro_step(engine, case, 0, DTYPES[precision])]
        weight, up = engine.module.second[0].weight, engine.module.up.weight
        shape = getattr(weight, "ds_shape", weight.shape)
        if precision == "fp32":  # in 16 bits stage 2 would make masters of all rounded weights
            with deepspeed.zero.GatheredParameters([up], modifier_rank=0), torch.no_grad():
                if engine.global_rank == 0 or stage == 2:
                    up.mul_(0.5)
            if stage == 2:
                engine.optimizer.refresh_fp32_params()
        utils.safe_set_full_fp32_param(weight, torch.linspace(-1, 1, shape.numel()).view(shape))
        utils.safe_set_full_optimizer_state(weight, torch.full(tuple(shape), 0.25), "exp_avg")
        arguments, keywords = case.batch(engine.global_rank, 1, DTYPES[precision])
        engine.backward(engine(*arguments, **keywords))
        seen.append(utils.safe_get_full_grad(weight).tolist())
        engine.step()
        seen += [utils.safe_get_full_fp32_param(weight).tolist(), utils.safe_get_local_fp32_param(weight).tolist()]
        seen.append(utils.safe_get_full_optimizer_state(weight, "exp_avg").tolist())
        out[stage] = (seen, digest(engine.module))
        engine.destroy()
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_programs_write_counts(precision: str) -> None:
    for found in run_ranks(written, 2, precision, deadline=90):
        assert found[3] == found[2]


def loaded() -> dict[str, Any]:
    over_gloo()
    donor, out = build(CASES["gpt"], seed=99), {}
    for stage in (2, 3):
        zero = {"stage3_gather_16bit_weights_on_model_save": True}
        engine = start(settings(stage, zero=zero), build(CASES["gpt"]))
        micro_step(engine, CASES["gpt"], 0, torch.float32)
        engine.load_module_state_dict(donor.state_dict())
        equal = torch.equal(values(engine.module), values(donor))
        micro_step(engine, CASES["gpt"], 1, torch.float32)
        engine.optimizer.refresh_fp32_params()
        state = engine._zero3_consolidated_16bit_state_dict()
        first = state is not None and all(v.numel() > 0 for v in state.values())
        out[stage] = (equal, digest(engine.module), first == (engine.global_rank == 0))
        engine.destroy()
    return out


def test_weights_loaded_into_a_sharded_model() -> None:
    for found in run_ranks(loaded, 2, deadline=90):
        assert found[3] == found[2]
        assert found[3][0] and found[3][2]


# -- zero.Init ---------------------------------------------------------------------------------------------------------


def constructed(name: str, stage: int, folder: str) -> dict[str, Any]:
    import deepspeed

    over_gloo()
    disk = {"offload_param": {"device": "nvme", "nvme_path": folder}} if name == "returns dict" else {}
    case, config = CASES[name], settings(stage, zero=disk)
    plain = train(case, settings(2))
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = build(case, seed=11 + deepspeed.comm.get_rank())  # rank 0's values count
    drafts = [p for p in model.parameters() if hasattr(p, "ds_id")]
    sharded = all(p.numel() == 0 for p in model.parameters()) and len(drafts) >= len(list(model.parameters())) - 2
    held, elements = sum(p.ds_tensor.numel() for p in drafts), sum(p.ds_numel for p in drafts)
    assert held <= elements / 2 + len(drafts)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    engine = start(config, model)
    losses = [micro_step(engine, case, index, torch.float32) for index in range(3)]
    found = {"losses": losses, "weights": digest(engine.module)}
    return {
        "sharded": sharded,
        "shapes": shapes == {n: tuple(p.shape) for n, p in build(case).named_parameters()},
        "same": found == {key: plain[key] for key in found},
    }


@pytest.mark.parametrize(
    ("name", "stage"),
    [("convolutions", 3), ("tied and frozen", 3), ("reused", 3), ("empty", 3), ("reused", 2), ("returns dict", 3)],
)
def test_a_model_that_no_rank_ever_held_whole(name: str, stage: int, tmp_path: Path) -> None:
    for found in run_ranks(constructed, 2, name, stage, str(tmp_path), deadline=90):
        assert all(found.values()), found


def afterwards() -> dict[str, Any]:
    """A module that is copied while it is whole; one whose engine is gone; what is left of an engine that is dropped."""
    import copy
    import gc
    import weakref

    import deepspeed

    over_gloo()
    case = CASES["gpt"]
    engine = start(settings(3), build(case))
    module = engine.module
    losses = [micro_step(engine, case, 0, torch.float32)]
    with deepspeed.zero.GatheredParameters(module.parameters()):
        copied = copy.deepcopy(module)
    arguments = case.batch(engine.global_rank, 1, torch.float32)[0]
    losses += [copied(*arguments).item(), engine(*arguments).item()]
    engine.destroy()
    found = {"copy": losses[1] == losses[2], "hooks": not module.blocks[0]._forward_hooks, "again": False}
    try:
        start(settings(3), module)
    except RuntimeError as error:
        found["again"] = "is gone" in str(error)
    engine = start(settings(3), build(case))
    micro_step(engine, case, 0, torch.float32)
    left = [weakref.ref(it) for it in (engine._native, engine._gather_hooks.native, engine.module.norm.weight)]
    del engine
    for _ in range(2):  # what native objects held is let go of when they are
        gc.collect()
    found["freed"] = all(it() is None for it in left)
    return found


def test_copies_and_what_an_engine_leaves_behind() -> None:
    for found in run_ranks(afterwards, 2, deadline=90):
        assert all(found.values()), found


class Careless(nn.Module):
    """Writes to a parameter of a module that it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        nn.init.constant_(self.layer.weight, 0.5)


def careless() -> None:
    import deepspeed

    over_gloo()
    with deepspeed.zero.Init():
        Careless()


def test_writing_to_a_released_parameter_is_an_error() -> None:
    for outcome in run_outcomes(careless, 2):
        assert outcome.status == "raised" and "GatheredParameters" in outcome.error, outcome.describe()


def resumed(folder: str) -> dict[str, Any]:
    """Saved at stage 3 over Gloo; loaded there and at stage 2."""
    over_gloo()
    case = CASES["tied and frozen"]
    engine = start(settings(3, "bf16"), build(case))
    for index in range(2):
        micro_step(engine, case, index, torch.bfloat16)
    engine.save_checkpoint(folder)
    losses = [micro_step(engine, case, index, torch.bfloat16) for index in range(2, 4)]
    out = {"straight": (losses, digest(engine.module))}
    engine.destroy()
    for stage in (2, 3):
        engine = start(settings(stage, "bf16", "defaults"), build(case, seed=99))
        micro_step(engine, case, 7, torch.bfloat16)  # small units stay whole until they are loaded
        engine.load_checkpoint(folder)
        losses = [micro_step(engine, case, index, torch.bfloat16) for index in range(2, 4)]
        out[f"stage {stage}"] = (losses, digest(engine.module))
        engine.destroy()
    return out


def test_checkpoints(tmp_path: Any) -> None:
    for found in run_ranks(resumed, 2, str(tmp_path), deadline=90):
        assert found["stage 2"] == found["stage 3"] == found["straight"]


# -- adapters ----------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Frozen matrices with small trained ones beside them, and an input that only an attribute shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Adapter() for _ in range(3))
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            block.memory = x * 0.5
            x = block(x)
        return F.mse_loss(self.out(x).squeeze(1).float(), y)


class Adapter(nn.Module):
    memory: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.base, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)
        self.other.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)) + self.other(torch.tanh(self.memory)))


def adapted() -> list[Any]:
    over_gloo()
    case, block = Case(Adapted, point_batch), {"zero": {"reduce_bucket_size": 90}}
    found = [train(case, settings(2, **block))]
    return found + [train(case, settings(3, limits=limits, **block)) for limits in LIMITS]


def test_frozen_matrices_with_adapters() -> None:
    for reference, *found in run_ranks(adapted, 2, deadline=90):
        assert all(it == reference for it in found)
