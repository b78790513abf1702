"""Models out of checkpoints, without an engine."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import final

import torch

@final
class SavedModel:
    """A checkpoint of any format, and the model in it: weights from the fp32 masters, in one dtype."""

    @staticmethod
    def open(path: str | PathLike[str], tag: str | None, dtype: str, exclude_frozen: bool) -> SavedModel:
        """Opens the checkpoint `tag` of the folder `path`, the latest, or the one whose own folder `path` is."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""

    @property
    def stage(self) -> int:
        """The ZeRO stage of the run that saved it; 0 where that is not known."""

    def client_state(self) -> bytes | None:
        """Rank 0's client state as torch.save wrote it; None where there is none."""

    def tensors(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and dtype, as `float32`, of each tensor."""

    @property
    def tied(self) -> list[tuple[str, str]]:
        """Other names of tensors: (other name, name)."""

    @property
    def absent(self) -> list[str]:
        """Frozen parameters that were left out when the checkpoint was saved."""

    def read(self, name: str, tensor: torch.Tensor) -> None:
        """Reads a tensor into one of its shape and dtype."""

def export_model(
    path: str | PathLike[str],
    tag: str | None,
    out: str | PathLike[str],
    *,
    dtype: str,
    max_shard_size: str | None,
    safetensors: bool,
    exclude_frozen: bool,
    overwrite: bool,
) -> tuple[list[Path], list[str]]:
    """Writes the model of a checkpoint into the folder `out`. Returns the files, and the frozen parameters that are not in
    them because the checkpoint does not have them."""

def write_universal(path: str | PathLike[str], out: str | PathLike[str], *, overwrite: bool) -> None:
    """Writes the checkpoint at `path` (its own folder, or one of checkpoints for the latest) as one of the original's
    universal format into the folder `out`. With `overwrite`, a universal checkpoint that is there is replaced."""

@final
class ModelFile:
    """A file of weights that is written tensor by tensor and appears when it is complete."""

    def __new__(
        cls,
        folder: str | PathLike[str],
        name: str,
        tensors: Sequence[tuple[str, Sequence[int], str]],
        tied: Sequence[tuple[str, str]],
    ) -> ModelFile:
        """Begins `folder/name`: safetensors if the name says so, else a torch file.

        tensors  (name, shape, dtype) in the order in which they will be written.
        tied     other names of some of them: (other name, name).
        """

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor."""

    def finish(self) -> None:
        """Gives the file its name."""
