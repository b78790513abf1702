"""Checkpoints to look into, written by ranks that trained a little, and the command that does."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import Finished, run_command, run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "engine"))

from toy import Toy, build, config, digest, micro_step, run, start  # noqa: F401

# The debug build of a checkout has the command elsewhere.
DEEPSPEED = os.environ.get("DEEPSPEED_COMMAND") or Path(sys.executable).parent / "deepspeed"


def checkpoint_command(*arguments: str | Path, **options: Any) -> Finished:
    """`deepspeed checkpoint ...` as a user runs it."""
    return run_command([DEEPSPEED, "checkpoint", *arguments], **options)


class Model(Toy):
    """The toy with buffers: floating-point, integer, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6, dtype=torch.float32).view(2, 3) / 7)
        self.register_buffer("half_table", torch.ones(3, dtype=torch.bfloat16) / 3)
        self.register_buffer("seen", torch.tensor(41))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def _train_and_save(folder: str, stage: int, precision: str, exclude_frozen: bool) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    engine = start(config(stage, precision, fp16=_FP16 if precision == "fp16" else None), build(Model))
    masters: dict[str, torch.Tensor] = {}
    for _ in range(2):
        run(engine, 1, first=engine.global_steps)
        engine.save_checkpoint(folder, client_state={"note": "kept"}, exclude_frozen_parameters=exclude_frozen)
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        masters[name] = (parameter.detach().float() if whole is None else whole).clone()
    return masters


_FP16 = {"enabled": True, "initial_scale_power": 8}


def save(
    folder: Path, world: int = 2, stage: int = 2, precision: str = "bf16", exclude_frozen: bool = False
) -> dict[str, torch.Tensor]:
    """Saves global_step1 and global_step2; returns the fp32 masters of the second, and frozen parameters, by name."""
    return run_ranks(_train_and_save, world, str(folder), stage, precision, exclude_frozen)[0]


_SHARED: dict[tuple[int, int, str, bool], tuple[Path, dict[str, torch.Tensor]]] = {}


def saved(
    world: int = 2, stage: int = 2, precision: str = "bf16", exclude_frozen: bool = False
) -> tuple[Path, dict[str, torch.Tensor]]:
    """What `save` makes, once for all tests of a process, which leave the folder as it is; and its masters."""
    key = (world, stage, precision, exclude_frozen)
    if key not in _SHARED:
        folder = Path(tempfile.mkdtemp(prefix="saved-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _SHARED[key] = folder, save(folder, *key)
    return _SHARED[key]


def fresh_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model with other weights."""
    return build(Model, seed=123).to(dtype)
