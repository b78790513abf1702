"""Whole fp32 weights out of a checkpoint, whatever world, stage and format wrote it. No code in a checkpoint is run."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from deepspeed import _native
from deepspeed.checkpoint.export_script import main as main
from deepspeed.runtime.zero.ordinary import held_elsewhere, make_ordinary
from deepspeed.utils.logging import logger


class LazyTensor:
    """A tensor that is read when `contiguous()` asks for it, each time anew."""

    def __init__(self, model: _native.SavedModel, name: str, shape: Sequence[int], dtype: torch.dtype):
        self._model, self._name = model, name
        self.shape, self.dtype = torch.Size(shape), dtype

    def numel(self) -> int:
        return self.shape.numel()

    def contiguous(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._model.read(self._name, tensor)
        return tensor


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> OrderedDict[str, Any]:
    """The model's state dict in fp32: masters, frozen parameters and buffers, on the CPU.

    checkpoint_dir  the folder given to save_checkpoint, or that of one checkpoint in it.
    tag             which checkpoint; by default the one that `latest` names.
    lazy_mode       values are read only when their `contiguous()` is called, so that memory holds one at a time.

    Names of one parameter share one tensor.
    """
    model = _native.SavedModel.open(
        checkpoint_dir, None if tag is None else str(tag), "fp32", exclude_frozen_parameters
    )
    _warn_of_absent(model.absent)
    state: OrderedDict[str, Any] = OrderedDict()
    for name, shape, dtype in model.tensors():
        lazy = LazyTensor(model, name, shape, getattr(torch, dtype))
        state[name] = lazy if lazy_mode else lazy.contiguous()
    state.update((other, state[name]) for other, name in model.tied)
    return state


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: int | str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes the fp32 model into `output_dir`: `pytorch_model.bin` or, with `safe_serialization`, `model.safetensors`;
    several files and an index where one would be larger than `max_shard_size`. Weights that are there are replaced."""
    files, absent = _native.export_model(
        checkpoint_dir,
        None if tag is None else str(tag),
        output_dir,
        dtype="fp32",
        max_shard_size=None if max_shard_size is None else str(max_shard_size),
        safetensors=safe_serialization,
        exclude_frozen=exclude_frozen_parameters,
        overwrite=True,
    )
    _warn_of_absent(absent)
    logger.info("wrote %s", ", ".join(map(str, files)))


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> torch.nn.Module:
    """`model` on the CPU with the fp32 weights of the checkpoint, in the dtypes that it has. It can no longer be trained by the
    engine it is in; at stage 3 that engine is destroyed, and the model is an ordinary one from here on."""
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    lost = sorted(held_elsewhere(model) - state.keys())
    if lost:
        raise RuntimeError(
            f"the model's weights lie on all ranks, and the checkpoint {os.fspath(checkpoint_dir)} was saved without "
            f"{', '.join(lost)}"
        )
    make_ordinary(model)
    model = model.cpu()
    model.load_state_dict(state, strict=False)
    return model


# What torch.load reads: a path, or an open file.
TorchFile: TypeAlias = str | io.BytesIO


def get_optim_files(checkpoint_dir: str | os.PathLike[str]) -> list[TorchFile]:
    """What `torch.load` reads an optimizer's stage from (`["optimizer_state_dict"]["zero_stage"]`), as Lightning does: the
    optimizer files of a checkpoint of the original, in the order of the ranks; for one of ours, that alone."""
    files = sorted(Path(checkpoint_dir).glob("*_optim_states.pt"), key=lambda path: (len(path.name), path.name))
    if files:
        return [str(path) for path in files]
    file = io.BytesIO()
    torch.save({"optimizer_state_dict": {"zero_stage": _opened(checkpoint_dir).stage}}, file)
    file.seek(0)
    return [file]


def get_model_state_file(checkpoint_dir: str | os.PathLike[str], zero_stage: int) -> TorchFile:
    """What `torch.load` reads client state from: rank 0's model file of a checkpoint of the original; for one of ours, rank
    0's client state."""
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if zero_stage == 3 else "mp_rank_00_model_states.pt"
    path = Path(checkpoint_dir) / name
    if path.is_file():
        return str(path)
    state = _opened(checkpoint_dir).client_state()
    if state is None:
        raise FileNotFoundError(f"{os.fspath(checkpoint_dir)}: there is no {name} and no client state")
    return io.BytesIO(state)


def _opened(folder: str | os.PathLike[str]) -> _native.SavedModel:
    return _native.SavedModel.open(folder, None, "fp32", False)


def _warn_of_absent(names: Sequence[str]) -> None:
    if names:
        logger.warning(
            "the checkpoint was saved without %d frozen parameters, and so is the model: %s",
            len(names),
            ", ".join(names),
        )


if __name__ == "__main__":
    main()
