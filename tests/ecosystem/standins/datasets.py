"""Stands in for the package `datasets` where accelerate's own scripts are run: pairs of sentences, made here, to be told apart by
whether they are the same. Nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from accelerate.state import PartialState

WORDS = [f"word{i}" for i in range(24)]
_prepare_backend = PartialState._prepare_backend


def _with_gloo(self: PartialState, cpu: bool = False, sagemaker: bool = False, backend: str | None = None) -> Any:
    # Without a GPU accelerate takes a process for alone, unless the script names a backend.
    return _prepare_backend(self, cpu, sagemaker, backend or "gloo")


PartialState._prepare_backend = _with_gloo


class Split:
    """Columns of equal length."""

    def __init__(self, columns: dict[str, list[Any]]):
        self.columns = columns

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


class DatasetDict(dict[str, Split]):
    """Splits by name."""

    def map(
        self,
        function: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
        remove_columns: list[str],
        **_options: Any,
    ) -> DatasetDict:
        found = DatasetDict()
        for name, split in self.items():
            kept = {key: values for key, values in split.columns.items() if key not in remove_columns}
            found[name] = Split({**kept, **function(split.columns)})
        return found

    def rename_column(self, old: str, new: str) -> DatasetDict:
        return DatasetDict(
            (name, Split({new if key == old else key: values for key, values in split.columns.items()}))
            for name, split in self.items()
        )


def load_dataset(path: str, name: str) -> DatasetDict:
    """The pairs, whatever is asked for."""
    return DatasetDict(train=_pairs(96, seed=1), validation=_pairs(24, seed=2))


def _pairs(size: int, seed: int) -> Split:
    source = random.Random(seed)
    columns: dict[str, list[Any]] = {"sentence1": [], "sentence2": [], "label": [], "idx": []}
    for index in range(size):
        sentences = [" ".join(source.choices(WORDS, k=source.randint(3, 6))) for _ in range(2)]
        same = source.random() < 0.5
        columns["sentence1"].append(sentences[0])
        columns["sentence2"].append(sentences[not same])
        columns["label"].append(int(same))
        columns["idx"].append(index)
    return Split(columns)
