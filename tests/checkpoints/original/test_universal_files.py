"""The universal format, file by file: what we make of the original's checkpoints is what it makes of them itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from test_original import plain, recorded  # noqa: F401  a fixture


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False, map_location="cpu")


@pytest.mark.parametrize(
    "name", ["fp32-stage2-world2", "bf16-stage2-world2", "fp32-stage3-world2", "bf16-stage3-world2"]
)
def test_it_is_what_the_original_makes_of_its_own(recorded: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    theirs, ours = recorded / name / "step3_universal", tmp_path / "out"
    ds_to_universal(["--input_folder", str(recorded / name / "step3"), "--output_folder", str(ours)])
    sharded = "stage3" in name

    trained = {path.parent.name for path in theirs.glob("zero/*/exp_avg.pt")}
    assert len(trained) == 7
    for folder in trained:
        files = {path.name for path in (theirs / "zero" / folder).iterdir()}
        assert {path.name for path in (ours / "zero" / folder).iterdir()} == files
        for file in files:
            assert plain(load(ours / "zero" / folder / file)) == plain(load(theirs / "zero" / folder / file)), file

    # The same masters by the other tool.
    state = get_fp32_state_dict_from_zero_checkpoint(recorded / name)
    for folder in trained:
        found = load(theirs / "zero" / folder / "fp32.pt")
        found = found.view(state[folder].shape) if sharded else found["param"]
        assert torch.equal(state[folder], found), folder
    assert state["head.weight"] is state["token.weight"] and "frozen.weight" in state

    # Rank 0's part of the flat state is left over in theirs.
    mine, other = (load(out / "zero/optimizer_state.pt") for out in (ours, theirs))
    left_over = {"fp32_flat_groups", "optimizer_state_dict"} if sharded else set()
    assert set(mine) - left_over == set(other) - left_over
    for key in set(mine) - left_over:
        one, two = mine[key], other[key]
        if key == "loss_scaler":
            one, two = vars(one), vars(two)
        if key == "param_groups":  # text for the test: torch's optimizers have tuples there
            one, two = ([{k: str(v) for k, v in group.items()} for group in groups] for groups in (one, two))
        assert one == two, key
    if sharded:
        steps = [out["optimizer_state_dict"]["state"][0]["step"] for out in (mine, other)]
        assert float(steps[0]) == float(steps[1])

    models = sorted(path.name for path in theirs.glob("*.pt"))
    assert models == sorted(path.name for path in ours.glob("*.pt"))
    for model in models:
        mine, other = load(ours / model), load(theirs / model)
        assert list(mine) == list(other)
        if sharded and "rank_1" in model:
            # Behind its elements the last rank has padding, which is what lay in memory in theirs.
            for name, fragment in other["frozen_param_fragments"].items():
                fragment[-1] = mine["frozen_param_fragments"][name][-1] = 0
        for key in set(mine) - {"ds_config"}:
            assert plain(mine[key]) == plain(other[key]), (model, key)
