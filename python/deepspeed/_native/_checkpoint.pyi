"""Checkpoints: saving and loading an engine's state."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch

from deepspeed._native._engine import Engine

@final
class LoadedCheckpoint:
    """A checkpoint of any format, open for reading."""

    @property
    def tag(self) -> str:
        """The tag."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""

    @property
    def format(self) -> str:
        """The format in words."""

    @property
    def world_size(self) -> int:
        """Number of ranks that saved it."""

    def face(self) -> str:
        """What Python saved as JSON."""

    def blob(self, name: str) -> bytes | None:
        """This rank's blob, or rank 0's where fewer ranks saved."""

    def trusted_file(self) -> tuple[Path, list[str]] | None:
        """The pickle in which this rank's client state lies among other things, and its keys there; None in a format
        that keeps it apart."""

    def weights(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and torch's dtype of every parameter whose weights are there."""

    def tied(self) -> list[tuple[str, str]]:
        """Other names of parameters: (other name, name)."""

    def read(self, name: str, kind: str, offset: int, tensor: torch.Tensor) -> bool:
        """Reads the elements of a parameter's `kind` from `offset` on into `tensor`, cast to its dtype. False if that
        was not saved."""

    def buffers(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and torch's dtype of every buffer."""

    def buffer(self, name: str) -> bytes:
        """The bytes of a buffer."""

@final
class SavedCheckpoint:
    """What a save did."""

    @property
    def tags_differ(self) -> bool:
        """Whether ranks had different tags."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""

    @property
    def behind(self) -> bool:
        """Whether it is written behind training, and not there yet."""

    @property
    def removed(self) -> list[str]:
        """Tags of older checkpoints that were removed, on rank 0."""

    @property
    def problems(self) -> list[str]:
        """Why others could not be."""

def wait_for_saves() -> list[tuple[Path, str]]:
    """Waits for every checkpoint of this process that is still being written. Returns the folders of those that failed
    without anybody having been told, with the reason."""

def save_checkpoint(
    engine: Engine,
    *,
    save_dir: str | PathLike[str],
    tag: str,
    fail_on_different_tags: bool,
    save_latest: bool,
    param_groups: Sequence[Mapping[str, Any]],
    slices: Sequence[tuple[int, str, int, torch.Tensor]],
    frozen: dict[str, torch.Tensor],
    exclude_frozen: bool,
    tied: Sequence[tuple[str, str]],
    buffers: dict[str, torch.Tensor],
    blobs: Sequence[tuple[str, bytes]],
    face: str,
) -> SavedCheckpoint:
    """Saves the engine's state with what Python adds.

    slices   of a client's optimizer: (index of the parameter, kind such as "exp_avg", first element, values).
    frozen   parameters that are not trained, left out with `exclude_frozen`.
    tied     other names of parameters and buffers: (other name, name).
    buffers  tensors of any dtype.
    blobs    bytes, each rank its own.
    face     JSON.
    """

def open_checkpoint(
    engine: Engine, *, load_dir: str | PathLike[str], tag: str | None, universal: bool
) -> LoadedCheckpoint | None:
    """Opens a checkpoint of any format; None if there is no `latest` that names one. Collective."""

def load_checkpoint(
    engine: Engine,
    checkpoint: LoadedCheckpoint,
    *,
    weights: bool,
    module_only: bool,
    optimizer_states: bool,
    strict: bool,
    param_groups: Sequence[Mapping[str, Any]],
    frozen: dict[str, torch.Tensor],
) -> None:
    """Loads a checkpoint into the engine, its parameters (with `weights`) and the `frozen` ones. Collective."""
