"""What a save or a load says when ranks, disks or files let it down, and that older checkpoints stay as they were."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
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


def on_one_rank(folder: str, rank: int, block: dict[str, Any]) -> tuple[str, float]:
    engine = start(config(2, checkpoint=block))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "good")
    engine.wait_for_checkpoint()
    if engine.global_rank == rank:
        return said(engine.save_checkpoint, folder, "alone")
    return said(micro_step, engine, 1)


@pytest.mark.parametrize(
    ("world", "rank", "block"),
    [(2, 0, {}), (4, 2, {}), (4, 0, {"async": True})],
    ids=["waiting-2", "waiting-4", "behind-4"],
)
def test_a_save_on_one_rank_only(tmp_path: Path, world: int, rank: int, block: dict[str, Any]) -> None:
    outcomes = run_outcomes(on_one_rank, world, str(tmp_path), rank, block, deadline=40)
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


@pytest.mark.parametrize("world", [2, 4])
def test_tags_that_differ(tmp_path: Path, world: int) -> None:
    for text, seconds in run_ranks(different_tags, world, str(tmp_path)):
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


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (4, 3)])
def test_a_file_that_cannot_grow(tmp_path: Path, world: int, rank: int) -> None:
    found = run_ranks(no_room, world, str(tmp_path), rank)
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


def full_disk(folder: str, block: dict[str, Any]) -> tuple[str, list[tuple[str, float]], list[str]]:
    """In a mount namespace of its own, where 1 MiB is all there is; then it cannot be written at all."""
    import ctypes

    clone_newns, ms_rec, ms_private, ms_remount, ms_rdonly = 0x00020000, 0x4000, 1 << 18, 32, 1
    libc = ctypes.CDLL(None, use_errno=True)
    rank = int(os.environ["RANK"])
    done = Path(folder + ".mounted")
    if rank == 0:
        pid = os.getpid()
        if libc.unshare(clone_newns) != 0 or libc.mount(b"none", b"/", None, ms_rec | ms_private, None) != 0:
            done.write_text("")
            return "no namespaces here", [], []
        if libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=1m") != 0:
            done.write_text("")
            return "no mounts here", [], []
        done.write_text(str(pid))
    else:
        while not done.exists() or (rank and not done.read_text() and time.sleep(0.05)):
            time.sleep(0.01)
        pid = done.read_text()
        if not pid:
            return "no mounts here", [], []
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        if libc.setns(fd, clone_newns) != 0:
            return "cannot enter the namespace", [], []
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

    found = [said(save)]
    torch_barrier()
    engine.load_checkpoint(folder)
    if rank == 0:
        os.unlink(os.path.join(folder, "ballast"))
        assert libc.mount(None, folder.encode(), None, ms_remount | ms_rdonly, b"size=1m") == 0, ctypes.get_errno()
    torch_barrier()
    found.append(said(save))
    micro_step(engine, 1)
    engine.load_checkpoint(folder)
    assert engine.global_steps == 1
    return "", found, toys.listed(folder)


def torch_barrier() -> None:
    import deepspeed

    deepspeed.comm.barrier()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize(("world", "block"), [(2, {}), (4, {"async": True})], ids=["waiting-2", "behind-4"])
def test_a_full_and_a_read_only_disk(tmp_path: Path, world: int, block: dict[str, Any]) -> None:
    (tmp_path / "disk").mkdir()
    for skipped, found, files in run_ranks(full_disk, world, str(tmp_path / "disk"), block):
        if skipped:
            pytest.skip(skipped)
        for problem, (text, seconds) in zip(("the disk is full", "read-only"), found, strict=True):
            assert text.startswith("CheckpointError: rank ") and problem in text, text
            assert seconds < 20
        assert files == ["good", "latest"]


def in_the_way(folder: str) -> list[tuple[str, float]]:
    engine = start(config(1))
    micro_step(engine, 0)
    Path(folder, "a file").write_text("x")
    return [
        said(engine.save_checkpoint, os.path.join(folder, "a file", "below"), "t"),
        said(engine.save_checkpoint, "/proc/self/nothing", "t"),
    ]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    one, *others = run_ranks(in_the_way, 4, str(tmp_path))
    for (mine, seconds), *theirs in zip(one, *others, strict=True):
        assert all(it == mine for it, _ in theirs) and mine.startswith("CheckpointError: rank 0: cannot create"), mine
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


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two checkpoints of two ranks, and what the weights are in the older one."""
    folder = tmp_path_factory.mktemp("two")
    ((old, _), _) = run_ranks(two_checkpoints, 2, str(folder))
    return folder, old


def load_damaged(folders: list[str]) -> list[tuple[str, float, bool, str, list[str], int]]:
    import logging

    from deepspeed.utils.logging import logger

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    engine = start(config(2, "bf16"), build(seed=9))
    out = []
    for folder in folders:
        micro_step(engine, 0)
        before = digest(engine.module)
        asked, seconds = said(engine.load_checkpoint, folder, "new")
        untouched = digest(engine.module) == before
        lines.clear()
        path, _ = engine.load_checkpoint(folder)
        told = [line for line in lines if "going on from" in line]
        found = f"{os.path.basename(path)} {digest(engine.module)}"
        out.append((asked, seconds, untouched, found, told, engine.global_steps))
    return out


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


@pytest.mark.parametrize("world", [2, 4])
def test_a_damaged_checkpoint(two: tuple[Path, str], tmp_path: Path, world: int) -> None:
    saved, old = two
    for damage, (name, change, _) in DAMAGE.items():
        shutil.copytree(saved, tmp_path / damage)
        file = tmp_path / damage / "new" / name
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(file.read_bytes()))
    before = contents(tmp_path)
    folders = [str(tmp_path / damage) for damage in DAMAGE]
    for rank, found in enumerate(run_ranks(load_damaged, world, folders)):
        for (name, _, problem), (asked, seconds, untouched, got, told, steps) in zip(
            DAMAGE.values(), found, strict=True
        ):
            # Asked for by name: an error, and nothing has been loaded.
            assert asked.startswith("CheckpointError: rank ") and name in asked and problem in asked, asked
            assert untouched and seconds < 20, name
            # Not asked for: the one before it, loudly.
            assert (got, steps) == (f"old {old}", 2)
            if rank == 0:
                assert len(told) == 1 and told[0].startswith("WARNING"), told
                assert name in told[0] and problem in told[0]
            else:
                assert not told
    assert contents(tmp_path) == before


def load_none(folders: list[str]) -> list[tuple[str, float]]:
    engine = start(config(2, "bf16"))
    return [said(engine.load_checkpoint, folder) for folder in folders]


def test_no_checkpoint_is_complete(two: tuple[Path, str], tmp_path: Path) -> None:
    folders = [tmp_path / "with latest", tmp_path / "without"]
    for folder in folders:
        shutil.copytree(two[0], folder)
        for tag in ("old", "new"):
            (folder / tag / "manifest.json").unlink()
    (folders[1] / "latest").unlink()
    for (text, seconds), (other, _) in run_ranks(load_none, 2, [str(folder) for folder in folders]):
        assert text.startswith("CheckpointError") and "manifest.json" in text, text
        assert seconds < 20
        assert "no checkpoint in" in other and "is complete" in other, other


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
