"""`deepspeed.utils.zero_to_fp32` and the scripts beside checkpoints, as programs written for the original use them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from saved import DEEPSPEED, checkpoint_command, fresh_model, saved

BUFFERS = ("table", "half_table", "seen")


@pytest.fixture(scope="module")
def saves() -> tuple[Path, dict[str, torch.Tensor]]:
    return saved(2, 2, "bf16")


def test_the_state_dict(saves: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, masters = saves
    state = get_fp32_state_dict_from_zero_checkpoint(folder)
    assert set(state) == {*masters, *BUFFERS, "head.weight"}
    for name, master in masters.items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], master), name
    assert state["head.weight"] is state["token.weight"]
    assert state["half_table"].dtype == torch.float32 and state["seen"].item() == 41
    fresh_model().load_state_dict(state)
    older = get_fp32_state_dict_from_zero_checkpoint(folder, tag="global_step1")
    assert not torch.equal(older["up.weight"], state["up.weight"])
    assert "frozen_scale" not in get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
    with pytest.raises(OSError, match="no checkpoint `absent`"):
        get_fp32_state_dict_from_zero_checkpoint(folder, tag="absent")


def test_the_lazy_state_dict(saves: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, masters = saves
    state = get_fp32_state_dict_from_zero_checkpoint(folder, lazy_mode=True)
    lazy = state["up.weight"]
    assert not isinstance(lazy, torch.Tensor)
    assert (lazy.shape, lazy.dtype, lazy.numel()) == (torch.Size([55, 18]), torch.float32, 990)
    assert torch.equal(lazy.contiguous(), masters["up.weight"])
    assert state["head.weight"] is state["token.weight"]


def test_into_a_model(saves: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, masters = saves
    model = load_state_dict_from_zero_checkpoint(fresh_model(), folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name]), name
    assert torch.equal(model.head.weight, masters["token.weight"])


@pytest.mark.parametrize("safe", [False, True])
def test_into_files(saves: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, safe: bool) -> None:
    folder, masters = saves
    convert_zero_checkpoint_to_fp32_state_dict(folder, tmp_path / "out", safe_serialization=safe)
    convert_zero_checkpoint_to_fp32_state_dict(folder, tmp_path / "out", safe_serialization=safe)  # replaces
    name = "model.safetensors" if safe else "pytorch_model.bin"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    path = tmp_path / "out" / name
    state = safetensors.torch.load_file(path) if safe else torch.load(path, weights_only=True)
    for key, master in masters.items():
        assert torch.equal(state[key], master), key
    if not safe:
        assert state["head.weight"].data_ptr() == state["token.weight"].data_ptr()
        fresh_model().load_state_dict(state)
        assert torch.load(path, mmap=True, weights_only=True)["mix.weight"].equal(masters["mix.weight"])
    convert_zero_checkpoint_to_fp32_state_dict(
        folder, tmp_path / "parts", max_shard_size="3KB", safe_serialization=safe
    )
    from huggingface_hub import load_torch_model

    model = fresh_model()
    load_torch_model(model, tmp_path / "parts", strict=not safe, safe=safe, weights_only=True)
    assert torch.equal(model.up.weight, masters["up.weight"])
    assert torch.equal(model.head.weight, masters["token.weight"])


def run_script(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # The command is looked for beside the interpreter, then on PATH; a debug build is elsewhere.
    program = (
        "import sys, runpy; from pathlib import Path; from deepspeed.launcher import _native_command as command\n"
        f"command.find = lambda: Path({str(DEEPSPEED)!r})\n"
        f"sys.argv = {[str(script), *map(str, arguments)]!r}\n"
        "sys.modules['torch'] = None  # nothing of it is needed\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_the_scripts_beside_a_checkpoint(saves: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, masters = saves
    for name in ("zero_to_fp32.py", "zero_to_torch.py"):
        assert stat.S_IMODE(os.stat(folder / name).st_mode) == 0o755
    out = tmp_path / "out"
    done = run_script(folder / "zero_to_fp32.py", folder, out, "--safe_serialization", "--max_shard_size", "1GB", "-d")
    assert done.returncode == 0, done.stderr
    state = safetensors.torch.load_file(out / "model.safetensors")
    assert torch.equal(state["up.weight"], masters["up.weight"])
    done = run_script(folder / "zero_to_torch.py", folder, out, "--dtype", "bf16", "-t", "global_step2")
    assert done.returncode == 0, done.stderr
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert torch.equal(state["up.weight"], masters["up.weight"].bfloat16())
    done = run_script(folder / "zero_to_torch.py", folder, out)
    assert done.returncode == 2 and "--dtype" in done.stderr


def test_no_scripts_at_stage_0() -> None:
    folder, _ = saved(1, 0, "fp32")
    assert sorted(path.name for path in folder.iterdir()) == ["global_step1", "global_step2", "latest"]
    assert checkpoint_command("verify", folder).code == 0


def test_files_of_the_original_are_found_by_name(tmp_path: Path) -> None:
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(11)]
    for name in names:
        (tmp_path / name).touch()
    assert [Path(path).name for path in get_optim_files(tmp_path)] == names
    with pytest.raises(OSError, match="checkpoint"):
        get_model_state_file(tmp_path, 2)
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    assert get_model_state_file(tmp_path, 2) == str(tmp_path / "mp_rank_00_model_states.pt")
