"""`deepspeed.zero.GatheredParameters`: reading whole parameters, and writing them on one rank for all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch

from deepspeed.runtime.zero.sharded_parameter import is_sharded


class GatheredParameters(contextlib.AbstractContextManager[None]):
    """Context in which the given parameters are whole on every rank.

    modifier_rank  the rank that may write them; when the context ends all ranks see what it has written. Every rank
                   enters the context. With None nobody may write, and nothing needs to be waited for.

    Parameters that are not sharded are left as they are.
    """

    def __init__(
        self,
        params: torch.nn.Parameter | Iterable[torch.nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ):
        listed: list[Any] = [params] if isinstance(params, torch.Tensor) else list(params)
        unique = dict.fromkeys(p for p in listed if enabled and is_sharded(p))
        self._by_home: dict[Any, list[torch.nn.Parameter]] = {}
        for parameter in unique:
            self._by_home.setdefault(parameter.ds_home, []).append(parameter)
        self._modifier_rank = modifier_rank

    def __enter__(self) -> None:
        for home, parameters in self._by_home.items():
            writer, last = self._modifier_rank, home.group.world_size - 1
            if writer is not None and not 0 <= writer <= last:
                raise ValueError(f"modifier_rank={writer}: the group has ranks 0 to {last}")
            home.begin_read(parameters)
            if writer is None:
                continue
            home.group.barrier("the beginning of GatheredParameters")
            if home.group.rank == writer:
                home.begin_write(parameters)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for home, parameters in self._by_home.items():
            if self._modifier_rank is not None:
                home.end_write(parameters, self._modifier_rank)
            home.end_read(parameters)
