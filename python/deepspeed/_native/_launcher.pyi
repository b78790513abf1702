"""A process's place among the ranks."""

from collections.abc import Sequence
from typing import final

@final
class Rendezvous:
    """One process's place: its rank of how many, its number on its host, and where rank 0 listens."""

    @staticmethod
    def alone() -> Rendezvous:
        """A world of one, met by nobody."""

    @staticmethod
    def from_hosts(rank: int, hosts: Sequence[str], master_addr: str, master_port: int) -> Rendezvous:
        """From the host name of every rank, as MPI gives them, and an address of rank 0's host for the others."""

    @property
    def rank(self) -> int:
        """0 to `world_size - 1`."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def local_rank(self) -> int | None:
        """Number on this host; None where the environment does not say."""

    @property
    def local_size(self) -> int | None:
        """Ranks on this host, where known."""

    @property
    def master_addr(self) -> str | None:
        """Host name or address of rank 0; None for a world of one that needs none, and where it is unknown."""

    @property
    def master_port(self) -> int:
        """Port on which rank 0 listens."""

    @property
    def source(self) -> str:
        """Who said so, in words."""

    @property
    def needs_master(self) -> bool:
        """Whether several ranks must meet at an address that the environment does not give."""

    def require_master(self) -> None:
        """Raises RuntimeError, with what to do, where `needs_master`."""

    def environment(self) -> dict[str, str]:
        """The variables by which every library finds its place: RANK, WORLD_SIZE and what else is known."""

def discover_rendezvous(environment: dict[str, str], port: int, all_sources: bool) -> Rendezvous | None:
    """This process's place, or None where no launcher left a trace. `port` is used where nothing names one.

    With `all_sources` false only RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are looked at.
    """
