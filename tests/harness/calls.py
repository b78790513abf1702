"""Several calls by one job of ranks: a job costs a second, a call only what it does."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.client import run_ranks

Key = TypeVar("Key")


@dataclass(frozen=True)
class Called:
    """What a call returned on each rank, and the tracebacks of those on which it raised."""

    values: list[Any]
    errors: dict[int, str]

    def check(self) -> list[Any]:
        """The values in rank order, or an AssertionError with what was raised."""
        assert not self.errors, "\n".join(f"rank {rank}: {error}" for rank, error in self.errors.items())
        return self.values


def run_calls(world: int, calls: Mapping[Key, Sequence[Any]], deadline: float = 300.0) -> dict[Key, Called]:
    """For each key, `function(*arguments)` of `(function, *arguments)`, by the same `world` ranks one after the other.

    Each call leaves things as it found them. One that raises on all ranks does not keep the next ones from running.
    """
    ranks: list[list[tuple[bool, Any]]] = []
    if calls:
        ranks = run_ranks(_each, world, [tuple(call) for call in calls.values()], deadline=deadline)
    found = {}
    for index, key in enumerate(calls):
        outcomes = [rank[index] for rank in ranks]
        errors = {rank: value for rank, (ok, value) in enumerate(outcomes) if not ok}
        found[key] = Called([value if ok else None for ok, value in outcomes], errors)
    return found


def _each(calls: list[tuple[Callable[..., Any], Any]]) -> list[tuple[bool, Any]]:
    out = []
    for function, *arguments in calls:
        try:
            out.append((True, function(*arguments)))
        except Exception:
            out.append((False, traceback.format_exc()))
    return out
