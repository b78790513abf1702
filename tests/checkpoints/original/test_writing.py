"""Checkpoints of ours written in the original's layout: torch reads them, we do, and the original goes on from them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_command, run_ranks
from original_cases import all_cases, client_state
from original_model import AFTER, BEFORE, train
from record_original import run_ranks as run_peer
from test_original import TOLERANCE, assert_close, plain, start

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


def convert(folder: Path, out: Path, stage: int, world: int) -> Path:
    command = [DEEPSPEED, "checkpoint", "convert", folder, out, "--to", "deepspeed-0.19"]
    run_command([*command, "--stage", str(stage), "--world", str(world)]).check()
    return out / "ours"


STAGES = {
    "bf16-stage1-world2": 1,
    "bf16-stage2-world2": 2,
    "fp32-stage2-world2": 2,
    "bf16-stage3-world2": 3,
    "fp32-stage3-world2": 3,
    "fp16-stage2-world2": 2,
    "fp16-stage3-world2": 3,
    "bf16-stage2-sgd-world2": 2,
    "bf16-stage2-client-adamw-world2": 2,
}


@pytest.mark.parametrize("name", ["bf16-stage2-world2", "fp32-stage3-world2", "fp16-stage2-world2"])
def test_torch_reads_what_is_written_and_so_do_we(tmp_path: Path, name: str) -> None:
    after = run_ranks(train_and_save, 2, str(tmp_path / "ours"), name)
    folder = convert(tmp_path / "ours", tmp_path / "theirs", STAGES[name], 2)
    assert (tmp_path / "theirs/latest").read_bytes() == b"ours"

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

    again = run_ranks(load_and_go_on, 2, str(tmp_path / "theirs"), name)
    for rank, (got, expected) in enumerate(zip(again, after, strict=True)):
        assert got["losses"] == expected["losses"]
        assert got["client"] == plain(client_state(rank if sharded else 0))


@pytest.mark.skipif("DS_PEER_VENV" not in os.environ, reason="the original is where DS_PEER_VENV says")
@pytest.mark.parametrize("name", STAGES)
def test_the_original_goes_on_from_what_is_written(tmp_path: Path, name: str) -> None:
    after = run_ranks(train_and_save, 2, str(tmp_path / "ours"), name)
    convert(tmp_path / "ours", tmp_path / "theirs", STAGES[name], 2)
    python = os.path.join(os.environ["DS_PEER_VENV"], "bin", "python")
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        try:
            run_peer(python, 2, [str(HERE / "go_on.py"), "--folder", str(tmp_path / "theirs"), "--case", name], log)
        except SystemExit as error:
            raise AssertionError(f"{error}\n{(tmp_path / 'log').read_text()[-4000:]}") from error
    for rank, expected in enumerate(after):
        got = json.loads((tmp_path / "theirs" / f"rank{rank}.json").read_text())
        assert got["version"].startswith("0.19.")
        assert (got["epoch"], got["calls"], got["steps"]) == (3, BEFORE, BEFORE)
        assert_close(got["losses"], expected["losses"], TOLERANCE[name.split("-")[0]], f"losses of rank {rank}")
