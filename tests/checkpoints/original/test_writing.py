"""Checkpoints of ours written in the original's layout: torch reads them, we do, and the original goes on from them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from harness import run_calls, run_command, run_ranks
from original_cases import all_cases, client_state
from original_model import AFTER, BEFORE, train
from record_original import run_ranks as run_peer
from test_original import TOLERANCE, assert_close, plain, recorded, start  # noqa: F401  a fixture

HERE = Path(__file__).parent
CASES = all_cases()
# The debug build of a checkout has the command elsewhere.
DEEPSPEED = os.environ.get("DEEPSPEED_COMMAND") or Path(sys.executable).parent / "deepspeed"


def train_and_save(folder: str, name: str) -> dict[str, Any]:
    engine = start(CASES[name], seed=20)
    train(engine, engine.global_rank, 0, BEFORE)
    engine.save_checkpoint(folder, tag="ours", client_state=client_state(engine.global_rank))
    after = train(engine, engine.global_rank, BEFORE, AFTER)
    engine.destroy()
    return after


def load_and_go_on(folder: str, name: str) -> dict[str, Any]:
    engine = start(CASES[name])
    _, client = engine.load_checkpoint(folder)
    after = train(engine, engine.global_rank, BEFORE, AFTER)
    engine.destroy()
    return {**after, "client": plain(client)}


def convert(folder: Path, out: Path, name: str, to: str = "deepspeed-0.19") -> Path:
    case = CASES[name]
    command = [DEEPSPEED, "checkpoint", "convert", folder, out, "--to", to]
    command += ["--stage", str(STAGES[name]), "--world", str(case["world"])]
    # At stage 0 the original keeps the state of torch's optimizers in another form than that of its own.
    torch_adam = (case["config"].get("optimizer") or {}).get("params", {}).get("torch_adam", False)
    run_command([*command, "--optimizer", "torch" if torch_adam else "deepspeed"]).check()
    return out / "ours"


STAGES = {name: case["config"]["zero_optimization"]["stage"] for name, case in CASES.items()}
# What the original's checkpoints have in these cases is another way to say what the other cases have.
WRITTEN = [name for name in CASES if "elastic" not in name and "bf16-optimizer" not in name]


READ_BACK = ["bf16-stage2-world2", "fp32-stage3-world2", "fp16-stage2-world2"]


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any], list[Any]]]:
    """By case: the folder in the original's layout, how the run went on after the save, and how from that folder."""
    folder = tmp_path_factory.mktemp("written")
    ours, theirs = ({name: folder / name / whose for name in READ_BACK} for whose in ("ours", "theirs"))
    after = run_calls(2, {name: (train_and_save, str(ours[name]), name) for name in READ_BACK})
    for name in READ_BACK:
        after[name].check()
        convert(ours[name], theirs[name], name)
    again = run_calls(2, {name: (load_and_go_on, str(theirs[name]), name) for name in READ_BACK})
    return {name: (theirs[name], after[name].check(), again[name].check()) for name in READ_BACK}


@pytest.mark.parametrize("name", READ_BACK)
def test_torch_reads_what_is_written_and_so_do_we(read_back: dict[str, Any], name: str) -> None:
    theirs, after, again = read_back[name]
    assert (theirs / "latest").read_bytes() == b"ours"
    folder = theirs / "ours"

    sharded = "stage3" in name
    prefix = "bf16_" if "bf16" in name else ""
    models = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]
    models = models if sharded else ["mp_rank_00_model_states.pt"]
    optimizers = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(models + optimizers)
    model = torch.load(folder / models[0], weights_only=False)
    assert sorted(model["buffer_names"]) == ["calls", "scale"] and model["module"]["calls"].item() == BEFORE
    assert [list(group) for group in model["param_shapes"]] == [
        ["token.weight", "up.weight", "down.weight"],
        ["norm.weight", "norm.bias", "up.bias", "down.bias"],
    ]
    assert model["param_shapes"][0]["up.weight"] == torch.Size([7, 5])
    assert model["shared_params"] == {"head.weight": "token.weight"}
    assert (model["global_steps"], model["dp_world_size"], model["lr_scheduler"]) == (
        BEFORE,
        2,
        {"last_batch_iteration": BEFORE - 1},
    )
    assert plain({key: model[key] for key in client_state(0)}) == plain(client_state(0))
    for rank, file in enumerate(optimizers):
        state = torch.load(folder / file, weights_only=False)["optimizer_state_dict"]
        assert int(state["zero_stage"]) == STAGES[name]
        assert type(state["loss_scaler"]).__name__ == ("DynamicLossScaler" if "fp16" in name else "LossScaler")
        base = state["optimizer_state_dict" if sharded else "base_optimizer_state"]
        assert [group["weight_decay"] for group in base["param_groups"]] == [0.1, 0.0]
        assert base["state"][0]["step"] == BEFORE
        masters = state["fp32_flat_groups" if sharded else "single_partition_of_fp32_groups"]
        sizes = [[64, 13], [64, 13]] if sharded else [[64, 12], [61, 10]]
        assert [part.numel() for part in masters] == sizes[rank]
        assert [base["state"][group]["exp_avg"].numel() for group in (0, 1)] == ([64, 13] if sharded else [64, 12])

    for rank, (got, expected) in enumerate(zip(again, after, strict=True)):
        assert got["losses"] == expected["losses"]
        assert got["client"] == plain(client_state(rank if sharded else 0))


def peer_goes_on(folder: Path, name: str, *more: str) -> list[dict[str, Any]]:
    """What the ranks of the original make of the checkpoint in `folder`."""
    python = os.path.join(os.environ["DS_PEER_VENV"], "bin", "python")
    world = CASES[name]["world"]
    with open(folder / "log", "w", encoding="utf-8") as log:
        try:
            run_peer(python, world, [str(HERE / "go_on.py"), "--folder", str(folder), "--case", name, *more], log)
        except SystemExit as error:
            raise AssertionError(f"{error}\n{(folder / 'log').read_text()[-4000:]}") from error
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def assert_it_went_on(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> None:
    for rank, (expected, got) in enumerate(zip(ours, theirs, strict=True)):
        assert got["version"].startswith("0.19.")
        steps = BEFORE * CASES[name]["config"]["gradient_accumulation_steps"]
        assert (got["epoch"], got["calls"], got["steps"]) == (3, steps, BEFORE)
        assert_close(got["losses"], expected["losses"], TOLERANCE[name.split("-")[0]], f"losses of rank {rank}")


PEER = pytest.mark.skipif("DS_PEER_VENV" not in os.environ, reason="the original is where DS_PEER_VENV says")


@PEER
@pytest.mark.parametrize("name", WRITTEN)
def test_the_original_goes_on_from_what_is_written(tmp_path: Path, name: str) -> None:
    after = run_ranks(train_and_save, CASES[name]["world"], str(tmp_path / "ours"), name)
    convert(tmp_path / "ours", tmp_path / "theirs", name)
    assert_it_went_on(after, peer_goes_on(tmp_path / "theirs", name), name)


@PEER
@pytest.mark.parametrize("name", ["bf16-stage2-world2", "fp32-stage3-world2"])
def test_the_script_that_the_original_puts_beside_its_checkpoints_runs(
    recorded: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    [script] = Path(os.environ["DS_PEER_VENV"]).glob("lib/python*/site-packages/deepspeed/utils/zero_to_fp32.py")
    script = shutil.copy(script, tmp_path)
    run_command([sys.executable, script, recorded / name, tmp_path / "out", "--tag", "step3"]).check()
    theirs = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    ours = get_fp32_state_dict_from_zero_checkpoint(recorded / name)
    assert set(theirs) == set(ours) and all(torch.equal(theirs[key], ours[key]) for key in ours)


@PEER
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("universal")])
def test_the_original_goes_on_as_from_its_own_universal_files(recorded: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    shutil.copytree(recorded / name, tmp_path / "theirs")
    theirs = peer_goes_on(tmp_path / "theirs", name, "--universal")
    run_command(
        [DEEPSPEED, "checkpoint", "convert", recorded / name / "step3", tmp_path / "ours/any", "--to", "universal"]
    ).check()
    ours = peer_goes_on(tmp_path / "ours", name, "--universal")
    assert [rank["losses"] for rank in ours] == [rank["losses"] for rank in theirs]


@PEER
@pytest.mark.parametrize("name", ["fp32-stage1-world1", "bf16-stage2-world2", "bf16-stage2-sgd-world2"])
def test_the_original_goes_on_from_the_universal_format(tmp_path: Path, name: str) -> None:
    after = run_ranks(train_and_save, CASES[name]["world"], str(tmp_path / "ours"), name)
    convert(tmp_path / "ours", tmp_path / "theirs/universal", name, "universal")
    # The original leaves buffers as they are, and is itself this far from its own run when it goes on from this format.
    for expected, got in zip(after, peer_goes_on(tmp_path / "theirs", name, "--universal"), strict=True):
        assert (got["epoch"], got["calls"], got["steps"]) == (3, 0, BEFORE)
        assert_close(got["losses"], expected["losses"], 1e-2, "losses")
