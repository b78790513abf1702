"""The fork server: imports torch and deepspeed once, then forks ranks on request, one job at a time.

It stays single-threaded and runs no tensor operation, so that a fork copies a quiet process. Each rank is a
session of its own, so that what it starts can be ended with it, and dies with the server.

    python -m harness.server FD [MODULE ...]        FD: the server's end of a socket pair; MODULE: what to import, too
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

from harness import wire
from harness.outcome import Job, Outcome

_STACK_SIGNAL = signal.SIGUSR1
_STACK_WAIT_S = 1.0
_PR_SET_PDEATHSIG = 1


def main(fd: int, preload: list[str]) -> None:
    deepspeed = importlib.import_module("deepspeed")
    # deepspeed imports on first use: name what ranks use, so that they find it imported.
    for name in ("comm", "runtime", "ops", "initialize"):
        getattr(deepspeed, name, None)
    # torch imports it, for seconds, when a process makes its first optimizer.
    importlib.import_module("torch._dynamo")
    for name in preload:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    sock = socket.socket(fileno=fd)
    while True:
        try:
            job = wire.receive(sock)
        except EOFError:
            return
        wire.send(sock, _run(job, sock))


def _run(job: Job, sock: socket.socket) -> list[Outcome]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        folder = Path(scratch)
        port = _free_port()
        began = time.monotonic()
        running: dict[int, int] = {}  # pidfd -> rank
        pids: dict[int, int] = {}
        for rank in range(job.world):
            pid = os.fork()
            if pid == 0:
                sock.close()
                _be_rank(job, rank, port, folder)
            pids[rank] = pid
            running[os.pidfd_open(pid)] = rank
        ended: dict[int, tuple[int, float]] = {}
        stopped: dict[int, str] = {}
        give_up = began + job.deadline_s
        someone_failed = False
        while running:
            ready, _, _ = select.select(list(running), [], [], max(0.0, give_up - time.monotonic()))
            for pidfd in ready:
                rank = running.pop(pidfd)
                os.close(pidfd)
                _kill_session(pids[rank])  # what it started; it is a zombie, so its number is still its own
                _, status = os.waitpid(pids[rank], 0)
                ended[rank] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
                if not someone_failed and _failed(folder, rank):
                    someone_failed = True
                    give_up = min(give_up, time.monotonic() + job.grace_s)
            if not ready and running:
                late = "stopped" if someone_failed else "hung"
                for rank in running.values():
                    stopped[rank] = late
                _collect_stacks([pids[rank] for rank in running.values()])
                for rank in running.values():
                    _kill_session(pids[rank])
                for pidfd, rank in list(running.items()):
                    _, status = os.waitpid(pids[rank], 0)
                    os.close(pidfd)
                    ended[rank] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
                running.clear()
        return [_outcome(folder, rank, *ended[rank], stopped.get(rank)) for rank in range(job.world)]


def _be_rank(job: Job, rank: int, port: int, folder: Path) -> None:
    """The forked child: never returns."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(_path(folder, rank, "log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        stacks = open(_path(folder, rank, "stacks"), "w")  # noqa: SIM115  kept open for the signal handler
        faulthandler.register(_STACK_SIGNAL, file=stacks, all_threads=True)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(job.world),
            LOCAL_RANK=str(rank),
            LOCAL_SIZE=str(job.world),
            LOCAL_WORLD_SIZE=str(job.world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for name, value in job.environment.items():
            if value == "":
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(job.cwd)
        sys.path[:] = job.sys_path
        partial = _path(folder, rank, "partial")
        partial.write_bytes(_call(job))
        partial.rename(_path(folder, rank, "result"))
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No interpreter shutdown: a rank's exit handlers would run what the server registered.
        os._exit(code)


def _call(job: Job) -> bytes:
    """Runs the function; the pickled ("returned", pickled value) or ("raised", type, text, traceback)."""
    try:
        function = importlib.import_module(job.module)
        for part in job.function.split("."):
            function = getattr(function, part)
        args, kwargs = pickle.loads(job.arguments)
        # The value is pickled apart: it may need the test's own modules, which the server does not import.
        return pickle.dumps(("returned", pickle.dumps(function(*args, **kwargs))))
    except SystemExit:
        raise
    except BaseException as error:
        return pickle.dumps(("raised", type(error).__name__, str(error), traceback.format_exc()))


def _failed(folder: Path, rank: int) -> bool:
    path = _path(folder, rank, "result")
    return not path.exists() or pickle.loads(path.read_bytes())[0] != "returned"


def _outcome(folder: Path, rank: int, exit_code: int, seconds: float, late: str | None) -> Outcome:
    output = _text(_path(folder, rank, "log"))
    path = _path(folder, rank, "result")
    if path.exists():
        kind, *rest = pickle.loads(path.read_bytes())
        if kind == "returned":
            return Outcome(rank, "returned", value=rest[0], output=output, seconds=seconds)
        return Outcome(
            rank, "raised", error_type=rest[0], error=rest[1], traceback=rest[2], output=output, seconds=seconds
        )
    if late is not None:
        stacks = _text(_path(folder, rank, "stacks"))
        return Outcome(rank, late, stacks=stacks, output=output, seconds=seconds)
    return Outcome(rank, "died", exit_code=exit_code, output=output, seconds=seconds)


def _collect_stacks(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, _STACK_SIGNAL)
    time.sleep(_STACK_WAIT_S)


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _path(folder: Path, rank: int, kind: str) -> Path:
    return folder / f"rank{rank}.{kind}"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
    # Nothing to tear down, and some of what torch imports complains about it.
    os._exit(0)
