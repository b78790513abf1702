"""Hosts that share no storage: each keeps the files of its own ranks; a load brings what a host lacks from the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import toys  # noqa: F401  puts the toy models on the path of the ranks

from harness import run_ranks
from toy import build, config, run, start


def home(folder: str) -> str:
    """The folder of this rank's host, one rank to a host."""
    host = f"host{os.environ['RANK']}"
    os.environ["DEEPSPEED_HOST_IDENTITY"] = host
    return os.path.join(folder, host)


def save_and_resume(folder: str, saved: int, loaded: int) -> tuple[Any, Any, list[str]]:
    place = home(folder)
    block = {"use_node_local_storage": True}
    engine = start(config(saved, "bf16", checkpoint=block))
    run(engine, 2)
    engine.save_checkpoint(place, client_state={"rank": engine.global_rank})
    files = sorted(os.listdir(os.path.join(place, "global_step2")))
    through = run(engine, 2, first=2)
    engine.destroy()
    engine = start(config(loaded, "bf16", checkpoint=block), build(seed=3))
    _, state = engine.load_checkpoint(place)
    assert state == {"rank": engine.global_rank}
    return through, run(engine, 2, first=2), files


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (3, 1)])
def test_each_host_keeps_its_own(tmp_path: Path, saved: int, loaded: int) -> None:
    for rank, (through, again, files) in enumerate(run_ranks(save_and_resume, 2, str(tmp_path), saved, loaded)):
        assert through == again
        ranked = [name for name in files if name.endswith(".safetensors")]
        assert ranked and all(f"rank-{rank:05}" in name for name in ranked), files


def both() -> str:
    try:
        start(config(1, checkpoint={"use_node_local_storage": True, "async": True}))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_not_behind_training() -> None:
    (said,) = run_ranks(both, 1)
    assert "DeepSpeedConfigError" in said and "checkpoint.async" in said, said
