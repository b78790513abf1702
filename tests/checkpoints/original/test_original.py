"""Checkpoints of the original: loaded at any stage and world, and trained on as the original itself went on."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import Called, run_calls, run_outcomes, run_ranks
from original_cases import all_cases, client_state
from original_model import AFTER, BEFORE, batch, build, client_optimizer, groups, train

HERE = Path(__file__).parent
CASES = all_cases()
# Relative, for losses of the 5 steps after the checkpoint.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with tarfile.open(HERE / "recorded.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def results(recorded: Path) -> dict[str, Any]:
    return json.loads((recorded / "results.json").read_text())


def start(case: dict[str, Any], seed: int = 999, **changes: Any) -> Any:
    import deepspeed

    torch.set_num_threads(1)
    model = build(seed)
    settings = {key: value for key, value in {**case["config"], **changes}.items() if value is not None}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=client_optimizer(case, model),
        model_parameters=groups(model),
        config=settings,
    )
    return engine


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def go_on(folder: str, name: str, changes: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    engine = start(CASES[name], **changes)
    path, client = engine.load_checkpoint(os.path.join(folder, name), **arguments)
    saved = {
        "path": path,
        "client": plain(client),
        "calls": engine.module.calls.item(),
        "counters": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        "world": engine.loaded_checkpoint_dp_world_size,
        "decay": [group["weight_decay"] for group in engine.optimizer.param_groups],
    }
    after = train(engine, engine.global_rank, BEFORE, AFTER)
    engine.destroy()
    return {**saved, **after}


def assert_close(got: list[float], expected: list[float], tolerance: float, what: str) -> None:
    for step, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert abs(one - other) <= tolerance * abs(other), f"{what}, step {step}: {got} instead of {expected}"


def mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    return [sum(step) / len(step) for step in zip(*(rank["losses"] for rank in ranks), strict=True)]


@pytest.fixture(scope="module")
def went_on(recorded: Path) -> dict[str, Called]:
    """All cases, by two jobs."""
    found: dict[str, Called] = {}
    for world in (1, 2):
        names = [name for name, case in CASES.items() if case["world"] == world]
        found |= run_calls(world, {name: (go_on, str(recorded), name, {}, {}) for name in names})
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_as_the_original_did(
    recorded: Path, results: dict[str, Any], went_on: dict[str, Called], name: str
) -> None:
    case, tolerance = CASES[name], TOLERANCE[name.split("-")[0]]
    ours = went_on[name].check()
    for rank, (got, theirs) in enumerate(zip(ours, results[name], strict=True)):
        steps = 2 * BEFORE if "accumulation" in name else BEFORE
        assert_close(got["losses"], theirs["after"]["losses"], tolerance, f"losses of rank {rank}")
        # At stage 3 the original divides the norm by the loss scale of the next step, which may have doubled.
        if None not in theirs["after"]["norms"] and name != "fp16-stage3-world2":
            assert_close(got["norms"], theirs["after"]["norms"], 10 * tolerance, "norms")
        sharded = "stage3" in name
        assert got["client"] == plain(client_state(rank if sharded else 0))
        assert got["calls"] == steps and got["world"] == case["world"] and got["decay"] == [0.1, 0.0]
        assert got["counters"] == (BEFORE, steps * 2 * case["world"], theirs["skipped"])
        assert Path(got["path"]) == recorded / name / "step3"


def train_split(engine: Any, world: int) -> list[float]:
    """As `train`, with the two recorded ranks' samples spread over `world` ranks."""
    losses = []
    for step in range(BEFORE, BEFORE + AFTER):
        both = [batch(step, rank) for rank in (0, 1)]
        inputs, targets = (torch.cat(parts).chunk(world)[engine.global_rank] for parts in zip(*both, strict=True))
        loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def go_on_elsewhere(
    folder: str, name: str, world: int, changes: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    engine = start(CASES[name], train_micro_batch_size_per_gpu=4 // world, **changes)
    path, _ = engine.load_checkpoint(os.path.join(folder, name), **arguments)
    losses = train_split(engine, world)
    engine.destroy()
    return {"losses": losses, "path": path}


ELSEWHERE = [
    ("fp32-stage0-world2", 4, 3, {}),
    ("fp32-stage1-world2", 1, 0, {}),
    ("fp32-stage2-world2", 4, 1, {}),
    ("fp32-stage3-world2", 1, 2, {}),
    ("bf16-stage0-world2", 1, 2, {}),
    ("bf16-stage1-world2", 4, 3, {}),
    ("bf16-stage2-round-robin-world2", 2, 3, {}),
    ("bf16-stage3-subgroups-world2", 4, 2, {}),
    ("bf16-optimizer-world2", 2, 3, {}),
    ("fp32-stage2-world2", 1, 3, {"tag": "step3_universal"}),
    ("bf16-stage2-world2", 4, 1, {"tag": "step3_universal"}),
    ("fp32-stage3-world2", 4, 0, {"tag": "step3_universal"}),
    ("bf16-stage3-world2", 2, 2, {"tag": "step3_universal"}),
]


@pytest.fixture(scope="module")
def went_on_elsewhere(recorded: Path) -> dict[int, Called]:
    """By the number of the case."""
    found: dict[int, Called] = {}
    for world in (1, 2, 4):
        calls = {
            index: (go_on_elsewhere, str(recorded), name, world, {"zero_optimization": {"stage": stage}}, arguments)
            for index, (name, its, stage, arguments) in enumerate(ELSEWHERE)
            if its == world
        }
        found |= run_calls(world, calls)
    return found


@pytest.mark.parametrize("index", range(len(ELSEWHERE)), ids=["-".join(map(str, case[:3])) for case in ELSEWHERE])
def test_it_goes_on_at_another_stage_and_world(
    results: dict[str, Any], went_on_elsewhere: dict[int, Called], index: int
) -> None:
    name, _, _, arguments = ELSEWHERE[index]
    ours = went_on_elsewhere[index].check()
    theirs = mean_losses([rank["after"] for rank in results[name]])
    assert_close(mean_losses(ours), theirs, TOLERANCE[name.split("-")[0]], "mean losses")
    assert Path(ours[0]["path"]).name == arguments.get("tag", "step3")


def test_it_goes_on_with_state_on_disk(recorded: Path, results: dict[str, Any], tmp_path: Path) -> None:
    name = "bf16-stage2-world2"
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    changes = {"zero_optimization": {"stage": 2, "offload_optimizer": offload}}
    ours = run_ranks(go_on, 2, str(recorded), name, changes, {})
    for got, theirs in zip(ours, results[name], strict=True):
        assert_close(got["losses"], theirs["after"]["losses"], TOLERANCE["bf16"], "losses")


def load_universal(folder: str, tag: str | None) -> str | None:
    engine = start(CASES["fp32-stage2-world2"], checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(folder, tag)
    engine.destroy()
    return path


def test_load_universal_takes_the_universal_one_or_says_that_it_is_none(recorded: Path) -> None:
    folder = recorded / "fp32-stage2-world2"
    assert Path(run_ranks(load_universal, 1, str(folder), None)[0]).name == "step3_universal"
    [outcome] = run_outcomes(load_universal, 1, str(folder), "step3")
    assert not outcome.ok and "load_universal" in outcome.error


def load_parts(folder: str, name: str, stage: int) -> dict[str, Any]:
    """What each way of loading part of a checkpoint leaves behind."""
    folder = os.path.join(folder, name)
    found: dict[str, Any] = {}
    case = {**CASES[name], "config": {**CASES[name]["config"], "zero_optimization": {"stage": stage}}}

    def whole(engine: Any) -> dict[str, Any]:
        state = engine.module_state_dict()
        return {key: value.clone() for key, value in state.items()}

    engine = start(case)
    engine.load_checkpoint(folder)
    reference = whole(engine)
    losses = train(engine, engine.global_rank, BEFORE, AFTER)["losses"]
    engine.destroy()

    seen: dict[str, Any] = {}

    def copy(src: dict[str, Any], dst: torch.nn.Module) -> None:
        seen.update({key: (tuple(value.shape), value.dtype) for key, value in src.items()})
        dst.load_state_dict(src)

    engine = start(case)
    engine.load_checkpoint(folder, custom_load_fn=copy)
    found["function sees all"] = set(seen) == set(reference) and all(
        seen[key] == (tuple(value.shape), value.dtype) for key, value in reference.items()
    )
    found["function loads"] = all(torch.equal(value, reference[key]) for key, value in whole(engine).items())
    found["function goes on"] = train(engine, engine.global_rank, BEFORE, AFTER)["losses"] == losses
    engine.destroy()

    def change(src: dict[str, Any], dst: torch.nn.Module) -> None:
        dst.load_state_dict({**src, "up.weight": torch.full_like(src["up.weight"], 0.25)})

    engine = start(case)
    engine.load_checkpoint(folder, custom_load_fn=change)
    engine.optimizer.param_groups[0]["lr"] = engine.optimizer.param_groups[1]["lr"] = 0.0
    changed = whole(engine)["up.weight"]
    found["function changes"] = bool((changed == 0.25).all())
    engine.lr_scheduler = None
    train(engine, engine.global_rank, BEFORE, 1)
    found["masters follow"] = bool((whole(engine)["up.weight"] == 0.25).all())
    engine.destroy()

    engine = start(case)
    engine.load_checkpoint(folder, load_module_only=True)
    found["module only"] = (
        engine.global_steps == 0
        and engine.lr_scheduler.last_batch_iteration == -1
        and all(torch.equal(value, reference[key]) for key, value in whole(engine).items())
    )
    engine.destroy()

    engine = start(case)
    engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    found["no optimizer"] = engine.global_steps == BEFORE and engine.lr_scheduler.last_batch_iteration == -1
    engine.destroy()
    return found


def train_and_save(folder: str, name: str) -> None:
    engine = start(CASES[name], seed=20)
    train(engine, engine.global_rank, 0, BEFORE)
    engine.save_checkpoint(os.path.join(folder, name), tag="ours")
    engine.destroy()


def test_parts_of_a_checkpoint(recorded: Path, tmp_path: Path) -> None:
    theirs = [("bf16-stage3-world2", 0), ("bf16-stage1-world2", 3), ("fp32-stage2-world2", 2)]
    ours = [("bf16-stage2-world2", 3), ("fp32-stage3-world2", 1)]
    for saved in run_calls(2, {name: (train_and_save, str(tmp_path), name) for name, _ in ours}).values():
        saved.check()
    calls = {("theirs", name, stage): (load_parts, str(recorded), name, stage) for name, stage in theirs}
    calls |= {("ours", name, stage): (load_parts, str(tmp_path), name, stage) for name, stage in ours}
    for case, found in run_calls(2, calls).items():
        for rank in found.check():
            assert rank == dict.fromkeys(rank, True), case


class Note:
    """A class of a script's own."""

    def __init__(self, text: str):
        self.text = text


class Evil:
    """What a malicious file does when it is unpickled."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def load_client(folder: str, trust: bool) -> Any:
    engine = start(CASES["fp32-stage1-world1"])
    before = {name: p.clone() for name, p in engine.module.named_parameters()}
    try:
        _, client = engine.load_checkpoint(folder, trust_client_state=trust)
        return client["note"].text, client["epoch"]
    except (OSError, ValueError) as error:
        untouched = all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())
        return f"{error}; {'untouched' if untouched else 'changed'}"
    finally:
        engine.destroy()


def test_code_in_a_file_is_not_executed(recorded: Path, tmp_path: Path) -> None:
    name, file = "fp32-stage1-world1", "step3/mp_rank_00_model_states.pt"
    model = torch.load(recorded / name / file, weights_only=False)
    marker = tmp_path / "executed"
    evil = Evil(str(marker))
    changes: dict[str, dict[str, Any]] = {"mine": {"note": Note("mine")}, "note": {"note": evil}}
    for key in ("module", "global_steps", "lr_scheduler", "param_shapes"):
        changes[key] = {"note": None, key: evil}
    for change, values in changes.items():
        shutil.copytree(recorded / name, tmp_path / change)
        torch.save({**model, **values}, tmp_path / change / file)
    calls = {change: (load_client, str(tmp_path / change), False) for change in changes}
    calls["trusted"] = (load_client, str(tmp_path / "mine"), True)
    found = {key: called.check()[0] for key, called in run_calls(1, calls).items()}
    assert found.pop("trusted") == ("mine", 3)
    refused = found.pop("mine")
    assert "Note" in refused and "trust_client_state" in refused and "untouched" in refused
    for key, refused in found.items():
        assert "posix.mkdir" in refused and "untouched" in refused, key
        assert key == "note" or "mp_rank_00_model_states.pt" in refused, key
    assert not marker.exists()
    # The same file does it when torch is told to trust it.
    torch.load(tmp_path / "note" / file, weights_only=False)
    assert marker.exists()
