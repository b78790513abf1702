"""`deepspeed checkpoint export`: files that other libraries read, with the bits of the masters."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from saved import DEEPSPEED, checkpoint_command, fresh_model, saved

BUFFERS = ("table", "half_table", "seen")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by way of the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return safetensors.torch.load_file(folder / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for name, file in where.items():
        with safetensors.safe_open(folder / file, framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert found.contiguous().flatten().view(torch.uint8).tolist() == (
        expected.contiguous().flatten().view(torch.uint8).tolist()
    ), name


@pytest.mark.parametrize(
    ("world", "stage", "precision"), [(1, 0, "bf16"), (2, 2, "bf16"), (3, 3, "fp16"), (4, 1, "fp32")]
)
def test_the_exported_weights_are_the_masters(tmp_path: Path, world: int, stage: int, precision: str) -> None:
    saves, masters = saved(world, stage, precision)
    done = checkpoint_command("export", saves, tmp_path / "whole").check()
    assert done.stdout.splitlines()[0] == str(tmp_path / "whole/model.safetensors")
    checkpoint_command("export", saves, tmp_path / "parts", "--max-shard-size", "3KB").check()
    parts = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert len(parts) > 3 and parts[0] == f"model-00001-of-{len(parts) - 1:05}.safetensors"
    model = fresh_model()
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        tensors = read(folder)
        assert set(tensors) == {*masters, *BUFFERS}
        for name, master in masters.items():
            assert_same(tensors[name], master, name)
        assert_same(tensors["seen"], torch.tensor(41), "seen")
        assert_same(tensors["half_table"], torch.ones(3).bfloat16().div(3).float(), "half_table")
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert (missing, unexpected) == (["head.weight"], [])
        assert_same(model.head.weight.data, masters["token.weight"], "tied")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    saves, masters = saved()
    checkpoint_command("export", saves, tmp_path / "out", "--dtype", dtype).check()
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tensors = read(tmp_path / "out")
    for name, master in masters.items():
        assert_same(tensors[name], master.to(torch_dtype), name)
    assert tensors["table"].dtype == torch.float32 and tensors["half_table"].dtype == torch.bfloat16


def test_tied_names_are_where_the_libraries_look(tmp_path: Path) -> None:
    saves, masters = saved(1, 0)
    checkpoint_command("export", saves, tmp_path / "out").check()
    with safetensors.safe_open(tmp_path / "out/model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "head.weight": "token.weight"}
    # Both of them are strict: they know that head.weight is token.weight.
    model = fresh_model()
    safetensors.torch.load_model(model, tmp_path / "out/model.safetensors")
    assert_same(model.head.weight.data, masters["token.weight"], "safetensors")
    from huggingface_hub import load_torch_model

    checkpoint_command("export", saves, tmp_path / "parts", "--max-shard-size", "3KB").check()
    for folder in ("out", "parts"):
        model = fresh_model()
        result = load_torch_model(model, tmp_path / folder, strict=False)
        assert result.unexpected_keys == []
        assert_same(model.head.weight.data, masters["token.weight"], folder)


def test_frozen_parameters(tmp_path: Path) -> None:
    checkpoint_command("export", saved()[0], tmp_path / "out", "--exclude-frozen").check()
    assert "frozen_scale" not in read(tmp_path / "out")
    done = checkpoint_command("export", saved(exclude_frozen=True)[0], tmp_path / "other").check()
    assert "saved without 1 frozen parameter(s), and so is the model: `frozen_scale`" in done.stderr
    assert "frozen_scale" not in read(tmp_path / "other")


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    saves, _ = saved(1, 0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    checkpoint_command("export", saves, out, "--max-shard-size", "3KB").check()
    before = sorted(path.name for path in out.iterdir())
    done = checkpoint_command("export", saves, out)
    assert done.code == 1 and "already exists" in done.stderr and "--overwrite" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == before
    checkpoint_command("export", saves, out, "--overwrite").check()
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_a_damaged_checkpoint_gives_no_model(tmp_path: Path) -> None:
    shutil.copytree(saved()[0], tmp_path / "saves")
    path = tmp_path / "saves/global_step2/optimizer-rank-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    done = checkpoint_command("export", tmp_path / "saves", tmp_path / "out")
    assert done.code == 1 and path.name in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["saves"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    saves, _ = saved(1, 0)
    limited = ["sh", "-c", 'ulimit -f 4; trap "" XFSZ; exec "$@"', "sh", str(DEEPSPEED), "checkpoint", "export"]
    done = subprocess.run([*limited, saves, tmp_path / "out"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def _save_something_larger(folder: str) -> None:
    import deepspeed

    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(24)])
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    deepspeed.initialize(model=model, config=settings)[0].save_checkpoint(folder, "large")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 96 MiB of weights."""
    from harness import run_ranks

    folder = tmp_path_factory.mktemp("large")
    run_ranks(_save_something_larger, 1, str(folder))
    return folder


def test_memory_stays_below_one_shard(large: Path, tmp_path: Path) -> None:
    shard = 20_000_000
    for dtype in ("fp32", "bf16"):
        arguments = ["export", large, tmp_path / dtype, "--max-shard-size", f"{shard}B", "--dtype", dtype]
        child = subprocess.Popen([DEEPSPEED, "checkpoint", *arguments], stdout=subprocess.DEVNULL)
        peak = 0
        # Its own high-water mark: that of `wait4` begins with what the parent had before the exec.
        while child.poll() is None:
            found = re.search(r"deepspeed[\s\S]*VmHWM:\s*(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
            peak = max(peak, int(found[1]) if found else 0)
        assert child.returncode == 0
        assert len(list((tmp_path / dtype).glob("model-*.safetensors"))) >= 3
        assert 0 < peak * 1024 < 1.1 * shard, peak


def test_a_killed_export_leaves_nothing_that_stays(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [str(DEEPSPEED), "checkpoint", "export", str(large), str(out)]
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while time.monotonic() < until and process.poll() is None:
            if any(path.name.startswith(".out.part-") and path.is_dir() for path in tmp_path.iterdir()):
                os.kill(process.pid, signal.SIGKILL)
                break
        killed += process.wait() == -signal.SIGKILL
        if killed and not out.exists():
            break
        if out.exists():
            (out / "model.safetensors").unlink()
            out.rmdir()
    assert killed, "no run was caught while it wrote"
    assert not out.exists()
    checkpoint_command("export", large, out).check()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(read(out)) == 48
