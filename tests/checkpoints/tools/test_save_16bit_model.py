"""`save_16bit_model`: the weights as one file, gathered unit by unit where ranks share no memory."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from harness import run_ranks
from saved import Model, build, config, fresh_model, run, start


def over_bytes() -> None:
    """Ranks that share no memory."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="cpu:gloo", timeout=timedelta(seconds=60), verbose=False)


def write(folder: str, stage: int, shared: bool, gather: bool) -> dict[str, Any]:
    if not shared:
        over_bytes()
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gather}
    engine = start(config(stage, "bf16", zero_optimization=zero), build(Model))
    run(engine, 2)
    out: dict[str, Any] = {
        "bin": engine.save_16bit_model(folder),
        "safe": engine.save_16bit_model(folder, "model.safetensors", exclude_frozen_parameters=True),
    }
    state = engine._zero3_consolidated_16bit_state_dict()
    out["state"] = None if state is None else {name: value.clone() for name, value in state.items()}
    return out


@pytest.mark.parametrize(("world", "stage", "shared"), [(1, 2, True), (2, 1, True), (3, 3, True), (2, 3, False)])
def test_both_formats(tmp_path: Path, world: int, stage: int, shared: bool) -> None:
    found = run_ranks(write, world, str(tmp_path), stage, shared, True)
    assert all(rank["bin"] is True and rank["safe"] is True for rank in found)
    assert [rank["state"] is None for rank in found] == [False, *[True] * (world - 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "pytorch_model.bin"]
    state = found[0]["state"]
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(saved) == set(state) and "head.weight" in saved
    for name, value in state.items():
        assert saved[name].dtype == value.dtype and torch.equal(saved[name], value), name
    assert saved["head.weight"].data_ptr() == saved["token.weight"].data_ptr()
    fresh_model(torch.bfloat16).load_state_dict(saved)
    safe = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(safe) == set(state) - {"frozen_scale", "head.weight"}
    for name, value in safe.items():
        assert torch.equal(state[name], value), name


def test_nothing_is_gathered_unless_the_config_says_so(tmp_path: Path) -> None:
    for rank in run_ranks(write, 2, str(tmp_path), 3, False, False):
        assert rank == {"bin": False, "safe": False, "state": None}
    assert list(tmp_path.iterdir()) == []
    # Where ranks share the weights there is nothing to gather.
    for rank in run_ranks(write, 2, str(tmp_path), 3, True, False):
        assert rank["bin"] is True


def cannot_write(folder: str, name: str) -> str:
    over_bytes()
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    engine = start(config(3, "bf16", zero_optimization=zero), build(Model))
    run(engine, 1)
    try:
        engine.save_16bit_model(folder, name)
    except OSError as error:
        return str(error)
    return "it wrote"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_error_of_the_rank_that_writes_is_one_on_all(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    found = run_ranks(cannot_write, 2, str(tmp_path / "file"), name)
    assert all("not a directory" in text for text in found), found
    assert found[1].startswith("rank 0: ")


class WithNotes(nn.Module):
    """A module whose state is not only tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.linear(x).squeeze(1) - y).square().mean()

    def get_extra_state(self) -> dict[str, Any]:
        return {"note": [1, "two"]}

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def with_notes(folder: str) -> str:
    engine = start(config(1), build(WithNotes))
    assert engine.save_16bit_model(folder)
    try:
        engine.save_16bit_model(folder, "model.safetensors")
    except ValueError as error:
        return str(error)
    return "it wrote"


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    found = run_ranks(with_notes, 1, str(tmp_path))
    assert "`_extra_state` of the state dict is a dict" in found[0] and ".bin" in found[0]
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert saved["_extra_state"] == {"note": [1, "two"]}
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
