"""Settings that have to be the same on every rank: whoever differs is told at the start, with both values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deepspeed import _native


def check_agreement(group: _native.Group, facts: Mapping[str, Any]) -> None:
    """Raises DeepSpeedConfigError on every rank unless all ranks have the same `facts` (names and JSON values)."""
    messages = group.all_gather_bytes("initialize: settings", json.dumps(facts).encode())
    if all(message == messages[0] for message in messages):
        return
    everybody = [json.loads(message) for message in messages]
    for rank, other in enumerate(everybody):
        for name, first in everybody[0].items():
            if other[name] != first:
                here, there = _where_apart(first, other[name])
                raise _native.DeepSpeedConfigError(
                    f"ranks disagree on {name}: rank 0 has {here}, rank {rank} has {there}; every rank must call "
                    "deepspeed.initialize with the same config, model and optimizer"
                )


def _where_apart(one: Any, other: Any) -> tuple[Any, Any]:
    """The first items that differ, of lists; else the values."""
    if not (isinstance(one, list) and isinstance(other, list)):
        return one, other
    for a, b in zip(one, other, strict=False):
        if a != b:
            return a, b
    return f"{len(one)} of them", f"{len(other)}"
