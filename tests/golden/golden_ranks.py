"""Runs golden_worker.py in several processes of one interpreter and gathers what they wrote."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
WORLD = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(
    python: str, only: str | None, deadline: float, log: str, backend: str | None = None
) -> tuple[list[dict[str, dict]], str]:
    """Returns per rank {case: result}, and how the run ended ("" when every rank exited with 0).

    The ranks' output goes to `log`; `deadline` is in seconds, after which what is left is killed.
    """
    with tempfile.TemporaryDirectory() as folder, open(log, "w", encoding="utf-8") as output:
        base = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(WORLD),
            "LOCAL_WORLD_SIZE": str(WORLD),
            "LOCAL_SIZE": str(WORLD),
            "CROSS_RANK": "0",
            "CROSS_SIZE": "1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            # The original builds its operators with the ninja of its own environment.
            "PATH": os.path.dirname(python) + os.pathsep + os.environ.get("PATH", ""),
        }
        command = [python, os.path.join(HERE, "golden_worker.py"), "--out", folder] + (
            [f"--only={only}"] if only else []
        )
        command += ["--backend", backend] if backend else []
        ranks = [
            subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(WORLD)
        ]
        ended, until = "", time.monotonic() + deadline
        try:
            while any(rank.poll() is None for rank in ranks):
                failed = [i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
                if failed:
                    ended = f"rank {failed[0]} exited with {ranks[failed[0]].returncode}"
                    break
                if time.monotonic() > until:
                    ended = f"not finished after {deadline:.0f} s"
                    break
                time.sleep(0.05)
            else:
                failed = [i for i, rank in enumerate(ranks) if rank.returncode != 0]
                ended = f"rank {failed[0]} exited with {ranks[failed[0]].returncode}" if failed else ""
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    # With whatever it started: the original compiles its operators in children.
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
        results = []
        for rank in range(WORLD):
            path = os.path.join(folder, f"rank{rank}.jsonl")
            lines = []
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    lines = [json.loads(line) for line in file if line.endswith("\n")]
            results.append({line["name"]: line["result"] for line in lines})
        return results, ended


def tail(log: str, lines: int = 30) -> str:
    with open(log, encoding="utf-8", errors="replace") as file:
        return "".join(file.readlines()[-lines:])


if __name__ == "__main__":
    sys.exit("this is a module: see record_golden.py")
