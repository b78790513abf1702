"""The Getting Started page, run: its loops, its config and its single-node commands are in scripts/, word for word."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from harness import Finished, run_command

SCRIPTS = Path(__file__).parent / "scripts"
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
DEADLINE = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the scripts in it."""
    shutil.copytree(SCRIPTS, tmp_path, dirs_exist_ok=True)
    return tmp_path


def launch(folder: Path, *arguments: str) -> Finished:
    return run_command([DEEPSPEED, *arguments], cwd=folder, deadline=DEADLINE, env={"OMP_NUM_THREADS": "1"})


def test_the_training_loop_with_the_sample_config(folder: Path) -> None:
    done = launch(folder, "--num_gpus", "2", "train.py", "--batches", "4",
                  "--deepspeed", "--deepspeed_config", "ds_config.json").check()  # fmt: skip
    for rank in range(2):
        line = rf"rank {rank} of 2: 4 steps, loss \d+\.\d+, stage 1, fp16 True, cmd_args.deepspeed=True"
        assert re.search(line, done.stdout), done.stdout
    assert (done.stdout + done.stderr).count('"zero_optimization": {"stage": 1}') == 1, "one hint, not one per rank"


def test_the_training_loop_without_the_launcher(folder: Path) -> None:
    done = run_command([sys.executable, "train.py", "--deepspeed_config", "ds_config.json"], cwd=folder,
                       deadline=DEADLINE, env={"OMP_NUM_THREADS": "1", "RANK": "", "WORLD_SIZE": ""})  # fmt: skip
    assert "rank 0 of 1: 6 steps" in done.check().stdout


def test_the_checkpoint_loop(folder: Path) -> None:
    config = ("--deepspeed", "--deepspeed_config", "ds_config.json")
    saves = folder / "saves"
    launch(folder, "--num_gpus=2", "begin.py", "--save_dir", "saves", *config).check()
    assert (saves / "latest").read_text().strip() == "begin"

    first = launch(folder, "--num_gpus=2", "resume.py", "--load_dir", "saves", "--save_dir", "saves",
                   "--ckpt_id", "begin", *config).check()  # fmt: skip
    assert "rank 1 ends at 6 steps, step 5" in first.stdout
    ids = {path.name for path in saves.iterdir() if path.is_dir()} - {"begin"}
    assert len(ids) == 3 and all(float(name) > 0 for name in ids), ids
    # The loss is another one on each rank: all use rank 0's, and are told so once.
    told = (first.stdout + first.stderr).count("ranks save under different tags")
    assert told == 1, first.stdout + first.stderr

    latest = (saves / "latest").read_text().strip()
    assert latest in ids
    again = launch(folder, "--num_gpus=2", "resume.py", "--load_dir", "saves", "--save_dir", "more", "--ckpt_id", latest,
                   "--batches", "9", *config).check()  # fmt: skip
    # Three batches were left, and the loop counts from 0 again, as the page has it.
    assert "rank 0 ends at 9 steps, step 2" in again.stdout


def test_init_distributed_in_place_of_torchs(folder: Path) -> None:
    done = launch(folder, "--num_gpus", "2", "distributed.py", "--deepspeed", "--deepspeed_config", "ds_config.json")
    for rank in range(2):
        assert f"rank {rank}: 2 ranks, 2 steps" in done.check().stdout


def test_schedules(folder: Path) -> None:
    lines = launch(folder, "--num_gpus", "1", "schedules.py").check().stdout
    assert "config [0.0, 0.05, 0.1, 0.1] WarmupLR" in lines
    assert "managed [0.05, 0.025, 0.0125, 0.00625] True" in lines
    assert "apart [0.1, 0.1, 0.05, 0.05] None" in lines


needs_two_slots = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="localhost has one slot")


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        pytest.param((), os.cpu_count() or 1, id="all slots"),
        pytest.param(("--num_gpus", "1"), 1, id="num_gpus"),
        pytest.param(("--num_gpus=3",), 3, id="more ranks than a small machine has cores"),
        pytest.param(("--include", "localhost:1"), 1, id="include", marks=needs_two_slots),
        pytest.param(("--include=localhost:0,1",), 2, id="include two", marks=needs_two_slots),
        pytest.param(("--exclude", "localhost:0"), (os.cpu_count() or 1) - 1, id="exclude", marks=needs_two_slots),
    ],
)
def test_single_node_commands(folder: Path, options: tuple[str, ...], ranks: int) -> None:
    done = launch(folder, *options, "client_entry.py", "--mine", "1", "--deepspeed", "--deepspeed_config",
                  "ds_config.json")  # fmt: skip
    if options == ("--num_gpus=3",) and done.code != 0:
        pytest.skip("this machine has fewer than 3 slots")
    started = re.findall(r"started with RANK=(\d+) WORLD_SIZE=(\d+) LOCAL_RANK=(\d+) (.*)", done.check().stdout)
    arguments = "--mine 1 --deepspeed --deepspeed_config ds_config.json"
    expected = [(str(r), str(ranks), str(r), f"--local_rank={r} {arguments}") for r in range(ranks)]
    assert sorted(started) == expected


def test_a_slot_that_is_not_there(folder: Path) -> None:
    done = launch(folder, "--include", "localhost:999", "client_entry.py")
    assert done.code not in (0, None)
    assert "999" in done.stderr and "localhost" in done.stderr
