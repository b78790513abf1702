"""`deepspeed checkpoint inspect | verify | diff | convert`, as a user runs them, on checkpoints of real ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from saved import Model, build, checkpoint_command, config, digest, saved, start


@pytest.fixture(scope="module")
def two() -> Path:
    """global_step1 and global_step2 of two ranks at stage 2 in bf16."""
    return saved()[0]


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(two, tmp_path / "copy"))


def as_json(*arguments: str | Path, code: int = 0) -> Any:
    done = checkpoint_command(*arguments, "--json")
    assert done.code == code, done.stderr
    return json.loads(done.stdout)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def test_inspect_lists_what_is_there_and_describes_the_latest(copy: Path) -> None:
    (copy / "logs").mkdir()
    (copy / ".tmp-global_step3-00000000000000ff").mkdir()
    shutil.copytree(copy / "global_step1", copy / "broken")
    (copy / "broken/manifest.json").unlink()
    found = as_json("inspect", copy)
    assert found["folder"]["latest"] == "global_step2"
    tags = {tag["tag"]: tag for tag in found["folder"]["tags"]}
    assert set(tags) == {"global_step1", "global_step2", "broken", ".tmp-global_step3-00000000000000ff"}
    assert [tags[name]["problem"] for name in ("global_step1", "global_step2")] == [None, None]
    assert "manifest.json: it is missing" in tags["broken"]["problem"]
    assert "a save that is under way" in tags[".tmp-global_step3-00000000000000ff"]["problem"]
    assert [name for name, tag in tags.items() if tag["latest"]] == ["global_step2"]

    facts = found["checkpoint"]
    assert facts["format"] == "deepspeed-checkpoint 1"
    assert (facts["tag"], facts["world"], facts["stage"]) == ("global_step2", 2, 2)
    assert facts["state"]["counters"]["global_steps"] == 2
    assert facts["tied"] == [["head.weight", "token.weight"]]
    assert {buffer["name"]: buffer["dtype"] for buffer in facts["buffers"]} == {
        "table": "F32",
        "half_table": "BF16",
        "seen": "I64",
    }
    params = {param["name"]: param for param in facts["params"]}
    assert params["up.weight"]["shape"] == [55, 18]
    assert {it["kind"]: it["dtype"] for it in params["up.weight"]["kinds"]} == {
        "weight": "BF16",
        "master": "F32",
        "exp_avg": "F32",
        "exp_avg_sq": "F32",
    }
    assert params["frozen_scale"]["group"] is None
    assert facts["kinds"]["master"]["bytes"] == 2 * facts["kinds"]["weight"]["bytes"] - 4 * 18

    text = checkpoint_command("inspect", copy).check().stdout
    for part in ("global_step2", "<- latest", "not usable: manifest.json", "ZeRO stage  2", "exp_avg_sq",
                 "counters.global_steps = 2", "[55, 18]", "frozen  weight BF16", "head.weight is token.weight"):  # fmt: skip
        assert part in text, part
    assert "logs" not in text


def test_inspect_one_of_them(two: Path) -> None:
    for arguments in ((two, "--tag", "global_step1"), (two / "global_step1",)):
        found = as_json("inspect", *arguments)
        assert found["folder"] is None
        assert found["checkpoint"]["state"]["counters"]["global_steps"] == 1


def test_what_is_not_there_is_said(two: Path, tmp_path: Path) -> None:
    done = checkpoint_command("inspect", two, "--tag", "global_step9")
    assert (done.code, done.stdout) == (1, "")
    assert "no checkpoint `global_step9`" in done.stderr and "global_step2, global_step1" in done.stderr
    assert "No such file" in checkpoint_command("verify", tmp_path / "absent").stderr
    assert "no checkpoints" in checkpoint_command("inspect", tmp_path).stdout
    done = checkpoint_command("export", tmp_path, tmp_path / "out")
    assert done.code == 1 and "no file `latest`" in done.stderr


def test_a_latest_that_is_damaged_is_an_error_after_the_list(copy: Path) -> None:
    (copy / "global_step2/manifest.json").write_text("{}")
    done = checkpoint_command("inspect", copy)
    assert done.code == 1
    assert "global_step1" in done.stdout and "not usable" in done.stdout
    assert "checkpoint `global_step2`" in done.stderr and "complete ones there: global_step1" in done.stderr


def test_verify_finds_every_wrong_byte(copy: Path) -> None:
    done = checkpoint_command("verify", copy).check()
    assert "as they were written" in done.stdout
    folder = copy / "global_step2"
    flip(folder / "optimizer-rank-00001-of-00002.safetensors", 5000)
    flip(folder / "weights-rank-00000-of-00002.safetensors", 20)
    report = as_json("verify", copy, code=1)
    assert not report["ok"]
    assert [problem.split(":")[0] for problem in sorted(report["problems"])] == [
        "optimizer-rank-00001-of-00002.safetensors",
        "weights-rank-00000-of-00002.safetensors",
    ]
    done = checkpoint_command("verify", copy)
    assert done.code == 1
    assert "bytes 0.." in done.stderr and "damaged in 2 place(s)" in done.stderr
    checkpoint_command("verify", copy, "--tag", "global_step1").check()


def test_diff_of_a_checkpoint_with_itself_and_with_the_next(two: Path) -> None:
    found = as_json("diff", two, two / "global_step2")
    assert found["same"] and found["differences"]["identical"] == 40
    found = as_json("diff", two / "global_step1", two, code=1)["differences"]
    assert [it["path"] for it in found["state"]][:2] == ["counters.micro_steps", "counters.global_steps"]
    assert found["identical"] == 7  # the frozen weight, three buffers, and of what has no gradient all but the master
    values = {(it["name"], it["kind"]): it for it in found["values"]}
    change = values["mix.weight", "master"]
    assert change["differing"] == change["elements"] == 49
    assert 0 < change["max_abs"] < 0.02  # one step of Adam at a rate of 0.01
    assert ("frozen_scale", "weight") not in values
    done = checkpoint_command("diff", two / "global_step1", two)
    assert done.code == 1 and "state counters.global_steps: 1 in a, 2 in b" in done.stdout
    assert checkpoint_command("diff", two, two / "absent").code == 2


def _of_another_model(folder: str) -> None:
    from torch import nn

    class Other(Model):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(7, 9)
            self.more = nn.Parameter(self.table[0].clone())
            del self.unused

    start(config(1), build(Other)).save_checkpoint(folder, "other")


def test_diff_of_different_models(two: Path, tmp_path: Path) -> None:
    run_ranks(_of_another_model, 1, str(tmp_path))
    found = as_json("diff", two, tmp_path, code=1)["differences"]
    assert "parameter `unused`" in found["only_in_a"]
    assert "`master` of parameter `token.weight`" in found["only_in_a"]
    assert found["only_in_b"] == ["parameter `more`"]
    facts = {fact["what"]: (fact["a"], fact["b"]) for fact in found["facts"]}
    assert facts["shape of parameter `mix.weight`"] == ("[7, 7]", "[9, 7]")
    assert facts["dtype of `weight` of parameter `up.bias`"] == ("bf16", "fp32")


def _continue(folder: str, tag: str) -> tuple[str, float, Any]:
    from saved import micro_step

    engine = start(config(1, "bf16"), build(Model, seed=5))
    _, client_state = engine.load_checkpoint(folder, tag)
    loss = micro_step(engine, 2)
    return digest(engine.module), loss, client_state


def test_a_converted_checkpoint_is_the_same_and_continues_the_same(two: Path, tmp_path: Path) -> None:
    done = checkpoint_command("convert", two, tmp_path / "one", "--to", "ours").check()
    assert done.stdout.strip() == str(tmp_path / "one/global_step2")
    checkpoint_command("verify", tmp_path / "one").check()
    assert as_json("diff", two, tmp_path / "one")["same"]
    assert run_ranks(_continue, 2, str(two), "global_step2") == run_ranks(
        _continue, 2, str(tmp_path / "one"), "global_step2"
    )
    # What is there is not replaced unasked, and a checkpoint never by itself.
    done = checkpoint_command("convert", two, tmp_path / "one", "--to", "ours")
    assert done.code == 1 and "already exists" in done.stderr
    checkpoint_command("convert", two, tmp_path / "one", "--to", "ours", "--overwrite").check()
    done = checkpoint_command("convert", two, two, "--to", "ours", "--overwrite")
    assert done.code == 1 and "already exists" in done.stderr


def test_a_file_of_that_name_is_a_script(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("print('a script')\n")
    done = checkpoint_command("--help", cwd=tmp_path)
    assert "inspect" not in done.stdout


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (3, 3), (4, 1)])
def test_any_world_and_stage(world: int, stage: int) -> None:
    folder, _ = saved(world, stage, "fp32")
    facts = as_json("inspect", folder)["checkpoint"]
    assert (facts["world"], facts["stage"]) == (world, stage)
    assert "master" not in facts["kinds"]
    checkpoint_command("verify", folder).check()
