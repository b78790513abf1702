"""The test's side: starts the fork server once and asks it to run functions on ranks."""

from __future__ import annotations

import atexit
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import wire
from harness.outcome import Job, Outcome

# A job's own deadline fires inside the server; this is how much later the test stops believing in the server.
_SERVER_MARGIN_S = 60.0


class RanksFailed(AssertionError):
    """At least one rank did not return. `outcomes` has all of them, in rank order."""

    def __init__(self, outcomes: list[Outcome]):
        self.outcomes = outcomes
        # The first cause comes before ranks that were stopped because of it.
        failed = sorted((o for o in outcomes if not o.ok), key=lambda o: (o.status == "stopped", o.seconds))
        super().__init__("\n\n".join(outcome.describe() for outcome in failed))


class _Server:
    def __init__(self, preload: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **{k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES},
            # A model on the CPU stays there, also on a host with an accelerator; tests of that say otherwise.
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *[p for p in sys.path if p]]),
            "PYTHONUNBUFFERED": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.server", str(theirs.fileno()), *preload],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._socket = ours

    def run(self, job: Job) -> list[Outcome]:
        self._socket.settimeout(job.deadline_s + job.grace_s + _SERVER_MARGIN_S)
        wire.send(self._socket, job)
        outcomes: list[Outcome] = wire.receive(self._socket)
        return [replace(o, value=pickle.loads(o.value)) if o.ok else o for o in outcomes]

    def stop(self) -> None:
        self._socket.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# By what they have imported beside torch.
_servers: dict[tuple[str, ...], _Server] = {}


def run_outcomes(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    deadline: float = 60.0,
    grace: float = 5.0,
    env: Mapping[str, str] | None = None,
    preload: Sequence[str] = (),
    **kwargs: Any,
) -> list[Outcome]:
    """Runs `function(*args, **kwargs)` on `world` forked ranks and returns what became of each, in rank order.

    function  at the top level of an importable module; arguments and results are pickled.
    deadline  seconds; ranks still running then are killed and reported as hung, with their stacks.
    grace     seconds the others may still run once one rank has failed.
    env       more environment variables; an empty string unsets one.
    preload   modules that ranks find imported, beside torch and deepspeed: each choice has a server of its own.
    """
    if "<locals>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is not at the top level of its module: ranks import it by name")
    server = _servers.get(tuple(preload))
    if server is None:
        if not _servers:
            atexit.register(shutdown)
        server = _servers[tuple(preload)] = _Server(tuple(preload))
    job = Job(
        module=function.__module__,
        function=function.__qualname__,
        world=world,
        arguments=pickle.dumps((args, kwargs)),
        deadline_s=deadline,
        grace_s=grace,
        environment=dict(env or {}),
        sys_path=list(sys.path),
        cwd=os.getcwd(),
    )
    try:
        return server.run(job)
    except (EOFError, OSError) as error:
        shutdown()
        raise RuntimeError(f"the fork server failed while running {job.module}.{job.function}: {error}") from error


def run_ranks(function: Callable[..., Any], world: int, *args: Any, **options: Any) -> list[Any]:
    """As `run_outcomes`, but returns the values in rank order, or raises RanksFailed with every failure's report."""
    outcomes = run_outcomes(function, world, *args, **options)
    if not all(outcome.ok for outcome in outcomes):
        raise RanksFailed(outcomes)
    return [outcome.value for outcome in outcomes]


def shutdown() -> None:
    """Ends the fork servers; the next run starts a fresh one."""
    while _servers:
        _servers.popitem()[1].stop()
