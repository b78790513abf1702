"""Runs benchmark children with a deadline and gathers the line `BENCH {json}` that one of them prints."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time


class ChildFailed(Exception):
    """A child ended with an error, printed no result, or took too long."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(python: str) -> dict[str, str]:
    """One compute thread a rank, the CPU accelerator, and the tools of the interpreter's own environment first.

    PYTHONPATH is left out: it would put one peer's packages before another's.
    """
    folder = os.path.dirname(os.path.abspath(python))
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": folder + os.pathsep + os.environ["PATH"],
    }


def _end(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run(commands: list[tuple[list[str], dict[str, str]]], deadline: float) -> str:
    """Starts all commands at once and returns their output together; raises ChildFailed for the first failure."""
    with tempfile.TemporaryFile() as output:
        children = []
        try:
            for command, env in commands:
                children.append(
                    subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                )
            until = time.monotonic() + deadline
            problem = None
            while problem is None and any(child.poll() is None for child in children):
                failed = [child.returncode for child in children if child.poll() not in (None, 0)]
                if failed:
                    problem = f"exit code {failed[0]}"
                elif time.monotonic() > until:
                    problem = f"not finished after {deadline:.0f} s"
                time.sleep(0.01)
            if problem is None and any(child.returncode for child in children):
                problem = f"exit code {next(c.returncode for c in children if c.returncode)}"
        finally:
            for child in children:
                _end(child)
        output.seek(0)
        text = output.read().decode("utf-8", errors="replace")
    if problem:
        said = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in said if "Error" in line or "error:" in line] or said[-1:]
        raise ChildFailed(f"{problem}: {errors[-1].strip() if errors else 'no output'}")
    return text


def result(text: str) -> dict:
    for line in text.splitlines():
        if "BENCH {" in line:
            return json.loads(line[line.index("BENCH {") + len("BENCH ") :])
    raise ChildFailed("no BENCH line in the output")


def single(python: str, arguments: list[str], deadline: float) -> dict:
    return result(run([([python, *arguments], environment(python))], deadline))


def ranks(python: str, arguments: list[str], world: int, deadline: float) -> dict:
    """Starts `world` ranks of one script with the variables that a launcher would set."""
    base = {
        **environment(python),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
    }
    return result(
        run([([python, *arguments], {**base, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world)], deadline)
    )


def engine_all_reduce(root: str, deadline: float) -> dict:
    """The engine's own collective over shared memory, without Python: `cargo bench -p deepspeed-comm`."""
    cargo = shutil.which("cargo")
    if cargo is None:
        raise ChildFailed("there is no cargo to build the engine's benchmark with")
    command = [
        cargo,
        "bench",
        "--quiet",
        "--manifest-path",
        os.path.join(root, "Cargo.toml"),
        "-p",
        "deepspeed-comm",
        "--bench",
        "all_reduce",
    ]
    text = run([(command, {**os.environ, "BENCH_MIB": "32", "BENCH_MS": "1000"})], deadline)
    found = re.search(r"^all_reduce fp32 +median +([0-9.]+) GB/s", text, re.MULTILINE)
    if found is None:
        raise ChildFailed("no line about all_reduce in the output of cargo bench")
    return {"engine_ms": 32 * 2**20 / float(found[1]) / 1e6}


def state_stream(root: str, deadline: float) -> dict:
    """1 GB of optimizer state read and written back, beside a plain direct copy: the example of `deepspeed-offload`."""
    cargo = shutil.which("cargo")
    if cargo is None:
        raise ChildFailed("there is no cargo to build the stream's benchmark with")
    command = [cargo, "run", "--quiet", "--release", "--manifest-path", os.path.join(root, "Cargo.toml")]
    command += ["-p", "deepspeed-offload", "--example", "stream_speed", "--", tempfile.gettempdir(), "1", "1"]
    text = run([(command, dict(os.environ))], deadline)
    found = re.search(r"^round +1: +([0-9.]+) +([0-9.]+); +([0-9.]+)", text, re.MULTILINE)
    if found is None:
        raise ChildFailed("no line about round 1 in the output of stream_speed")
    # GB/s, read and written: 1 GB goes both ways.
    one_by_one, side_by_side, stream = (2000.0 / float(speed) for speed in found.groups())
    return {"stream_ms": stream, "one_by_one_ms": one_by_one, "side_by_side_ms": side_by_side}


def start_up(command: list[str], python: str, script: str, world: int, deadline: float) -> dict:
    """Seconds from starting `command` to the first line of `script` in the last rank."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        run([([*command, script, folder], environment(python))], deadline)
        reached = []
        for rank in range(world):
            try:
                with open(os.path.join(folder, str(rank)), encoding="ascii") as file:
                    reached.append(float(file.read()))
            except FileNotFoundError:
                raise ChildFailed(f"rank {rank} never reached the script") from None
        return {"first_line_s": max(reached) - started}
