"""What a save or a load says when ranks, disks or files let it down, and that older checkpoints stay as they were."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import toys  # puts the toy models on the path of the ranks

from harness import run_outcomes, run_ranks
from toy import build, config, digest, micro_step, run, start


def said(function: Any, *args: Any, **kwargs: Any) -> tuple[str, float]:
    """The exception that the call raises, as text, and the seconds it took."""
    began = time.monotonic()
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "", time.monotonic() - began


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- saving ------------------------------------------------------------------------------------------------------------


def on_one_rank(folder: str, block: dict[str, Any]) -> tuple[str, float]:
    engine = start(config(2, checkpoint=block))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "good")
    engine.wait_for_checkpoint()
    if engine.global_rank == 0:
        return said(engine.save_checkpoint, folder, "alone")
    return said(micro_step, engine, 1)


@pytest.mark.parametrize("block", [{}, {"async": True}], ids=["waiting", "behind"])
def test_a_save_on_one_rank_only(tmp_path: Path, block: dict[str, Any]) -> None:
    outcomes = run_outcomes(on_one_rank, 2, str(tmp_path), block, deadline=40)
    for outcome in outcomes:
        text, seconds = outcome.value
        assert "checkpoint tag" in text, text
        assert seconds < 20, text
    assert (tmp_path / "latest").read_text() == "good"
    assert toys.listed(tmp_path) == ["good", "latest"]


def different_tags(folder: str) -> tuple[str, float]:
    engine = start(config(1, checkpoint={"tag_validation": "FAIL", "async": True}))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "good")
    out = said(engine.save_checkpoint, folder, f"tag{engine.global_rank}")
    engine.wait_for_checkpoint()
    return out


def test_tags_that_differ(tmp_path: Path) -> None:
    for text, seconds in run_ranks(different_tags, 2, str(tmp_path)):
        assert "rank 0 has `tag0`, rank 1 has `tag1`" in text
        assert seconds < 20
    assert toys.listed(tmp_path) == ["good", "latest"]


def no_room(folder: str, rank: int) -> tuple[tuple[str, float], tuple[str, float]]:
    engine = start(config(1, "bf16"))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "good")
    if engine.global_rank == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    found = said(engine.save_checkpoint, folder, "good"), said(engine.save_checkpoint, folder, "other")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_cannot_grow(tmp_path: Path, rank: int) -> None:
    found = run_ranks(no_room, 2, str(tmp_path), rank)
    for texts in found:
        for text, seconds in texts:
            assert text.startswith(f"CheckpointError: rank {rank}: cannot") and "File too large" in text, text
            assert seconds < 20
    assert toys.listed(tmp_path) == ["good", "latest"]
    (steps,) = run_ranks(loaded_steps, 1, str(tmp_path), "good")
    assert steps == 1


def loaded_steps(folder: str, tag: str) -> int:
    engine = start(config(1, "bf16"), build(seed=9))
    engine.load_checkpoint(folder, tag)
    return int(engine.global_steps)


def full_disk(folder: str, block: dict[str, Any]) -> tuple[str, tuple[str, float], list[str]]:
    """In a mount namespace of its own, where 600 KiB are all there is."""
    import ctypes

    clone_newns, ms_rec, ms_private = 0x00020000, 0x4000, 1 << 18
    libc = ctypes.CDLL(None, use_errno=True)
    rank = int(os.environ["RANK"])
    done = Path(folder + ".mounted")
    if rank == 0:
        pid = os.getpid()
        if libc.unshare(clone_newns) != 0 or libc.mount(b"none", b"/", None, ms_rec | ms_private, None) != 0:
            done.write_text("")
            return "no namespaces here", ("", 0.0), []
        if libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=600k") != 0:
            done.write_text("")
            return "no mounts here", ("", 0.0), []
        done.write_text(str(pid))
    else:
        while not done.exists() or (rank and not done.read_text() and time.sleep(0.05)):
            time.sleep(0.01)
        pid = done.read_text()
        if not pid:
            return "no mounts here", ("", 0.0), []
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        if libc.setns(fd, clone_newns) != 0:
            return "cannot enter the namespace", ("", 0.0), []
    engine = start(config(2, checkpoint=block))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "good")
    engine.wait_for_checkpoint()
    if rank == 0:
        with open(os.path.join(folder, "ballast"), "wb") as ballast:
            left = os.statvfs(folder)
            ballast.write(b"x" * (left.f_bavail * left.f_bsize - 20_000))
    torch_barrier()

    def save() -> None:
        engine.save_checkpoint(folder, "full")
        engine.wait_for_checkpoint()

    found = said(save)
    torch_barrier()
    engine.load_checkpoint(folder)
    assert engine.global_steps == 1
    return "", found, toys.listed(folder)


def torch_barrier() -> None:
    import deepspeed

    deepspeed.comm.barrier()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("block", [{}, {"async": True}], ids=["waiting", "behind"])
def test_a_full_disk(tmp_path: Path, block: dict[str, Any]) -> None:
    (tmp_path / "disk").mkdir()
    for skipped, (text, seconds), files in run_ranks(full_disk, 2, str(tmp_path / "disk"), block):
        if skipped:
            pytest.skip(skipped)
        assert text.startswith("CheckpointError: rank ") and "the disk is full" in text, text
        assert seconds < 20
        assert files == ["ballast", "good", "latest"]


def in_the_way(folder: str) -> list[tuple[str, float]]:
    engine = start(config(1))
    micro_step(engine, 0)
    Path(folder, "a file").write_text("x")
    return [
        said(engine.save_checkpoint, os.path.join(folder, "a file", "below"), "t"),
        said(engine.save_checkpoint, "/proc/self/nothing", "t"),
    ]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    one, other = run_ranks(in_the_way, 2, str(tmp_path))
    for (mine, seconds), (theirs, _) in zip(one, other, strict=True):
        assert mine == theirs and mine.startswith("CheckpointError: rank 0: cannot create"), mine
        assert seconds < 20


# -- loading -----------------------------------------------------------------------------------------------------------


def two_checkpoints(folder: str) -> list[str]:
    engine = start(config(2, "bf16"))
    digests = []
    for tag in ("old", "new"):
        run(engine, 2)
        engine.save_checkpoint(folder, tag)
        digests.append(digest(engine.module))
    return digests


def load_damaged(folder: str) -> tuple[str, str, str, list[str], int]:
    import logging

    from deepspeed.utils.logging import logger

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    engine = start(config(2, "bf16"), build(seed=9))
    before = digest(engine.module)
    asked, _ = said(engine.load_checkpoint, folder, "new")
    untouched = str(digest(engine.module) == before)
    path, _ = engine.load_checkpoint(folder)
    told = [line for line in lines if "going on from" in line]
    return asked, untouched, f"{os.path.basename(path)} {digest(engine.module)}", told, engine.global_steps


DAMAGE = {
    "cut short": ("weights-rank-00001-of-00002.safetensors", lambda data: data[:-7], "it has "),
    "a flipped bit": (
        "optimizer-rank-00001-of-00002.safetensors",
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        "checksum",
    ),
    "a missing shard": ("optimizer-rank-00000-of-00002.safetensors", None, "it is missing"),
    "a manifest of another": ("manifest.json", lambda data: data.replace(b'"stage": 2', b'"stage": 1'), "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    ((old, _), _) = run_ranks(two_checkpoints, 2, str(tmp_path))
    name, change, problem = DAMAGE[damage]
    file = tmp_path / "new" / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    before = contents(tmp_path)
    for rank, (asked, untouched, found, told, steps) in enumerate(run_ranks(load_damaged, 2, str(tmp_path))):
        # Asked for by name: an error, and nothing has been loaded.
        assert asked.startswith("CheckpointError: rank ") and name in asked and problem in asked, asked
        assert untouched == "True"
        # Not asked for: the one before it, loudly.
        assert (found, steps) == (f"old {old}", 2)
        if rank == 0:
            assert len(told) == 1 and told[0].startswith("WARNING"), told
            assert name in told[0] and problem in told[0]
        else:
            assert not told
    assert contents(tmp_path) == before


def load_none(folder: str) -> tuple[str, float]:
    return said(start(config(2, "bf16")).load_checkpoint, folder)


def test_no_checkpoint_is_complete(tmp_path: Path) -> None:
    run_ranks(two_checkpoints, 2, str(tmp_path))
    for tag in ("old", "new"):
        (tmp_path / tag / "manifest.json").unlink()
    for text, seconds in run_ranks(load_none, 2, str(tmp_path)):
        assert text.startswith("CheckpointError") and "manifest.json" in text, text
        assert seconds < 20
    (tmp_path / "latest").unlink()
    for text, _ in run_ranks(load_none, 2, str(tmp_path)):
        assert "no checkpoint in" in text and "is complete" in text, text


def frozen_round_trip(folder: str, stage: int) -> tuple[bool, float, bool]:
    engine = start(config(stage, "bf16"))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "without", exclude_frozen_parameters=True)
    engine.save_checkpoint(folder, "with")
    wanted = digest(engine.module)
    model = build(seed=3)
    model.frozen_scale.data.fill_(3.0)
    other = start(config(stage, "bf16"), model)
    other.load_checkpoint(folder, "without")
    kept = float(other.module.frozen_scale[0])
    differs = digest(other.module) != wanted
    other.load_checkpoint(folder, "with")
    return digest(other.module) == wanted, kept, differs


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_parameters_left_out(tmp_path: Path, stage: int) -> None:
    for same, kept, differs in run_ranks(frozen_round_trip, 2, str(tmp_path), stage):
        assert same and differs and kept == 3.0
