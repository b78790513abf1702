"""Runs Python ranks for tests: a server forks them with torch already imported, every wait has a deadline.

    from harness import run_ranks

    def body(scale):                     # a module-level function; every rank runs it
        import deepspeed
        deepspeed.init_distributed()
        return deepspeed.comm.get_rank() * scale

    assert run_ranks(body, 2, 10) == [0, 10]

`run_calls` has several calls done by one job of ranks. `run_outcomes` is for tests where ranks are meant to fail: it returns what became of each rank and raises
nothing. `run_command` runs a program in a session of its own that is ended whole at the deadline.
"""

from harness.calls import Called, run_calls
from harness.client import RanksFailed, run_outcomes, run_ranks, shutdown
from harness.command import Finished, run_command
from harness.outcome import Outcome

__all__ = [
    "Called",
    "Finished",
    "Outcome",
    "RanksFailed",
    "run_calls",
    "run_command",
    "run_outcomes",
    "run_ranks",
    "shutdown",
]
