"""Process groups: the engine's collectives."""

from collections.abc import Sequence
from typing import final

import torch

from deepspeed._native._metrics import CommsLog
from deepspeed.runtime.torch_transport import StoreBoard, TorchTransport

@final
class Group:
    """A process group of the engine's."""

    @staticmethod
    def alone() -> Group:
        """The world of one."""

    @staticmethod
    def create_shared(world: int, deadline_seconds: float) -> Group:
        """Makes the shared memory of `world` ranks of this host and joins it as rank 0. The others get `handle()`."""

    @staticmethod
    def join_shared(handle: str, rank: int, deadline_seconds: float) -> Group:
        """Joins the shared memory behind `handle` as `rank`."""

    @staticmethod
    def over_torch(
        transport: TorchTransport,
        board: StoreBoard,
        rank: int,
        identities: list[tuple[str, tuple[int, int]]],
        name: str,
        deadline_seconds: float,
    ) -> Group:
        """The engine's collectives over torch.distributed; `name` is how errors call it. `identities` has each rank's
        `host_identity()` and `process_identity()`."""

    @property
    def transport(self) -> str:
        """What carries the bytes."""

    @property
    def rank(self) -> int:
        """This process's rank."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    def recorded(self, log: CommsLog) -> Group:
        """The same group, whose collectives are counted in `log`."""

    def handle(self) -> str | None:
        """What the other ranks need to join, where this rank made the shared memory."""

    def shares_memory(self) -> bool:
        """Whether all ranks can map the same memory."""

    def set_activity(self, activity: str) -> None:
        """Says what the program is doing, for the report of a rank that waits for it."""

    def barrier(self, what: str) -> None:
        """Waits until every rank has called."""

    def all_gather_bytes(self, what: str, mine: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order."""

    def broadcast(self, tensors: dict[str, torch.Tensor], root: int) -> None:
        """Rank `root`'s values in every rank's tensors (by name, of any dtype)."""

def host_identity() -> str:
    """What tells whether two processes can share memory: the machine's boot, and the namespaces that decide whether one
    can open the other's files under /proc."""

def process_identity() -> tuple[int, int]:
    """Process id of this process, and when it started in clock ticks since boot."""

def shares_memory(identities: Sequence[str], backend: str | None) -> bool:
    """Whether the engine's collectives run over shared memory: every rank on one host, and no other transport asked for
    (`dist_backend` of `init_distributed`)."""
