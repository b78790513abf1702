"""What clients read off a parameter of stage 3: its identity, its true size, and where it lies."""

from __future__ import annotations

import itertools
from enum import Enum
from types import MethodType
from typing import Any

import torch

from deepspeed import _native


class ZeroParamType(Enum):
    """How a parameter is kept."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroParamStatus(Enum):
    """Whether a sharded parameter is whole at the moment. Where ranks share one copy of the weights it always is."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Home:
    """Who keeps a sharded parameter, and how a program may read and write it. No parameters stand for all there are.

    gathers  whether parameters are released while nobody needs them.
    """

    group: _native.Group
    gathers = False

    def begin_read(self, parameters: list[torch.nn.Parameter]) -> None:
        """Makes them whole; collective where that is to be done."""

    def end_read(self, parameters: list[torch.nn.Parameter]) -> None:
        """They need not be whole any more."""

    def begin_write(self, parameters: list[torch.nn.Parameter]) -> None:
        """This rank is about to write; the others wait."""

    def end_write(self, parameters: list[torch.nn.Parameter], writer: int | None) -> None:
        """Collective: all ranks see what rank `writer` has written; with None all have written the same."""

    def shards_changed(self) -> None:
        """The engine's shards have new values that whole parameters lack."""


_ids = itertools.count()
# What a sharded parameter has beside attributes that begin with `ds_`.
_OTHER_MARKS = (
    "is_external_param",
    "nvme_swapper",
    "all_gather",
    "all_gather_coalesced",
    "partition",
    "partition_numel",
    "aligned_size",
    "padding_size",
)


def mark_sharded(parameter: torch.nn.Parameter, home: Home, part: Any = None) -> None:
    """Gives `parameter` the attributes that clients look for. `part` are the elements that this rank keeps; without it
    the parameter is a view of shared weights."""
    p: Any = parameter
    if not hasattr(p, "ds_id"):
        p.ds_id = next(_ids)
        p.ds_active_sub_modules = set()
        p.ds_persist = False
        p.is_external_param = False
        p.nvme_swapper = None
        p.ds_param_type = ZeroParamType.PARTITIONED
        for method in (all_gather, partition, partition_numel, aligned_size, padding_size, ds_summary):
            setattr(p, method.__name__, MethodType(method, p))
        p.all_gather_coalesced = lambda parameters, **_options: [q.all_gather() for q in parameters]
    group = home.group
    p.ds_home = home
    p.ds_process_group = group
    p.ds_zero_partition_rank, p.ds_zero_partition_world_size = group.rank, group.world_size
    if part is None:
        p.ds_shape, p.ds_numel = parameter.shape, parameter.numel()
        length = partition_numel(p)
        part = parameter.data.view(-1)[group.rank * length : (group.rank + 1) * length]
    p.ds_status = ZeroParamStatus.AVAILABLE if p.numel() == p.ds_numel else ZeroParamStatus.NOT_AVAILABLE
    p.ds_numel_aligned = aligned_size(p)
    p.ds_tensor = part
    p.ds_tensor.ds_numel = part.numel()
    p.ds_tensor.status = ZeroParamStatus.AVAILABLE
    p.ds_tensor.final_location = None


def unmark_sharded(parameter: Any) -> None:
    """Takes `mark_sharded` back."""
    for name in [name for name in vars(parameter) if name.startswith(("ds_", "_ds_"))] + list(_OTHER_MARKS):
        delattr(parameter, name)


def is_sharded(parameter: Any) -> bool:
    """Whether stage 3 keeps this parameter."""
    return hasattr(parameter, "ds_home")


def is_gathered(parameter: Any) -> bool:
    """Whether this parameter is released while nobody needs it."""
    return is_sharded(parameter) and parameter.ds_home.gathers


def true_shape(parameter: Any) -> torch.Size:
    """The shape, whether the parameter is whole or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


# -- methods of a sharded parameter, by the names that clients call ----------------------------------------------------


def all_gather(self: Any, *_args: Any, **_options: Any) -> Any:
    """Makes the parameter whole until `partition`; it is already where ranks share the weights."""
    self.ds_home.begin_read([self])
    return self


def partition(self: Any, *_args: Any, **_options: Any) -> None:
    """Takes `all_gather` back."""
    self.ds_home.end_read([self])


def partition_numel(self: Any) -> int:
    """Elements of one rank's part, were the parameter cut into equal parts."""
    return -(-self.ds_numel // self.ds_zero_partition_world_size)


def aligned_size(self: Any) -> int:
    """Elements of all ranks' parts."""
    return partition_numel(self) * self.ds_zero_partition_world_size


def padding_size(self: Any) -> int:
    """Elements by which the parts are more than the parameter."""
    return aligned_size(self) - self.ds_numel


def ds_summary(self: Any, *_args: Any, **_options: Any) -> dict[str, Any]:
    """The facts in one dict."""
    return {
        "id": self.ds_id,
        "status": self.ds_status.name,
        "numel": self.numel(),
        "ds_numel": self.ds_numel,
        "shape": tuple(self.shape),
        "ds_shape": tuple(self.ds_shape),
        "requires_grad": self.requires_grad,
        "persist": self.ds_persist,
    }
