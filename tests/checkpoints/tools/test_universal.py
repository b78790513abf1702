"""The original's universal format, by `deepspeed checkpoint convert` and `deepspeed.checkpoint.ds_to_universal`."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from saved import DEEPSPEED, checkpoint_command, saved


@pytest.mark.parametrize(("world", "stage", "precision"), [(2, 2, "bf16"), (1, 0, "fp32"), (2, 3, "fp16")])
def test_everything_goes_along(tmp_path: Path, world: int, stage: int, precision: str) -> None:
    ours, masters = saved(world, stage, precision)
    out = tmp_path / "theirs/universal"
    # The namespace that programs for the original pass.
    ds_to_universal(
        Namespace(
            input_folder=str(ours / "global_step2"),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    assert (tmp_path / "theirs/latest_universal").read_text() == "universal"
    models = sorted(path.name for path in out.glob("*.pt"))
    sharded = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
    assert models == (sharded if stage == 3 else ["mp_rank_00_model_states.pt"])

    found = torch.load(out / "zero/up.weight/fp32.pt", weights_only=True)
    flat = found if stage == 3 else found["param"].flatten()
    assert torch.equal(flat, masters["up.weight"].flatten())
    assert stage == 3 or (found["cat_dim"], found["param"].shape) == (0, masters["up.weight"].shape)
    assert (out / "zero/up.weight/step.pt").exists() == (stage < 3)
    state = torch.load(out / "zero/optimizer_state.pt", weights_only=False)
    assert int(state["zero_stage"]) == max(stage, 1) and len(state["param_groups"]) == 1

    # Read back: the numbers are the same, bit by bit, in both directions.
    done = checkpoint_command("diff", ours, out, "--json")
    assert done.code in (0, 1), done.stderr
    values = json.loads(done.stdout)["differences"]["values"]
    assert [it for it in values if it["kind"] != "weight"] == []
    checkpoint_command("convert", out, tmp_path / "back", "--to", "ours").check()
    done = checkpoint_command("diff", ours, tmp_path / "back", "--json")
    values = json.loads(done.stdout)["differences"]["values"]
    assert [it for it in values if it["kind"] != "weight"] == []


def test_what_is_there_is_replaced_only_if_it_is_one(tmp_path: Path) -> None:
    ours, _ = saved(1, 0, "fp32")
    out = tmp_path / "universal"
    convert = ("convert", ours, out, "--to", "universal")
    checkpoint_command(*convert).check()
    assert "already exists" in checkpoint_command(*convert).stderr
    (out / "zero/stale").mkdir()
    checkpoint_command(*convert, "--overwrite").check()
    assert not (out / "zero/stale").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    done = checkpoint_command("convert", ours, mine, "--to", "universal", "--overwrite")
    assert done.code == 1 and [path.name for path in mine.iterdir()] == ["thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest_universal", "mine", "universal"]

    # The command line of the original's module, whose last act is the native command; a debug build has that elsewhere.
    arguments = ["ds_to_universal", "--input_folder", str(ours / "global_step1"), "--output_folder", str(out)]
    program = (
        "import sys, runpy; from pathlib import Path; from deepspeed.launcher import _native_command as command\n"
        f"command.find = lambda: Path({str(DEEPSPEED)!r})\n"
        f"sys.argv = {[*arguments, '--keep_temp_folder', '--num_extract_workers', '4', '--no_strict']!r}\n"
        "runpy.run_module('deepspeed.checkpoint.ds_to_universal', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert torch.load(out / "zero/up.weight/step.pt", weights_only=True) == 1
