"""Stands in for the package `evaluate` where accelerate's own scripts are run."""

from __future__ import annotations

import torch


class Accuracy:
    """The share of predictions that are right, since the last `compute`."""

    def __init__(self) -> None:
        self._right = self._all = 0

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self._right += int((predictions == references).sum())
        self._all += len(references)

    def compute(self) -> dict[str, float]:
        found = {"accuracy": self._right / self._all}
        self._right = self._all = 0
        return found


def load(path: str, name: str) -> Accuracy:
    """The accuracy, whatever is asked for."""
    return Accuracy()
