"""Records small checkpoints of the original and what its own runs do next, as tests/checkpoints/original/recorded.tar.xz.

benches/peer-venv.sh FOLDER
python tests/checkpoints/original/record_original.py --python FOLDER/bin/python [--only TEXT] [--keep OUT]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

from original_cases import all_cases

HERE = os.path.dirname(os.path.abspath(__file__))


def environment(python: str, world: int) -> dict[str, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # PYTHONPATH may lead to ours.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **inherited,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # The original builds its operators with the ninja of its own environment.
        "PATH": os.path.dirname(python) + os.pathsep + os.environ.get("PATH", ""),
    }


def run_ranks(python: str, world: int, arguments: list[str], log: Any, deadline: float = 900) -> None:
    env = environment(python, world)
    ranks = [
        subprocess.Popen(
            [python, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    try:
        codes = [rank.wait(deadline) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}; see {log.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the interpreter that has the original")
    parser.add_argument("--only", default="", help="record the cases whose names contain this")
    parser.add_argument("--keep", help="leave the files in this folder instead of packing them")
    args = parser.parse_args()
    out = args.keep or tempfile.mkdtemp(prefix="original-")
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "record.log"), "w", encoding="utf-8") as log:
        for world in sorted({case["world"] for case in all_cases().values()}):
            run_ranks(args.python, world, [os.path.join(HERE, "worker.py"), "--out", out, "--only", args.only], log)
        for name, case in all_cases().items():
            if case.get("universal") and args.only in name:
                source, target = (os.path.join(out, name, tag) for tag in ("step3", "step3_universal"))
                convert = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
                convert += ["--input_folder", source, "--output_folder", target]
                convert += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
                env = environment(args.python, 1)
                subprocess.run([args.python, *convert], stdout=log, stderr=log, env=env, check=True)
    results: dict[str, Any] = {}
    for name, case in all_cases().items():
        if args.only not in name:
            continue
        ranks = []
        for rank in range(case["world"]):
            path = os.path.join(out, name, f"rank{rank}.json")
            with open(path, encoding="utf-8") as file:
                ranks.append(json.load(file))
            os.remove(path)
        results[name] = ranks
        print(name, ranks[0].get("error") or "recorded")
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            for root, _, files in os.walk(os.path.join(out, name)):
                if script in files:
                    os.remove(os.path.join(root, script))
    with open(os.path.join(out, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    if args.keep:
        return
    with tarfile.open(os.path.join(HERE, "recorded.tar.xz"), "w:xz", preset=9) as archive:
        for entry in sorted(os.listdir(out)):
            if entry != "record.log":
                archive.add(os.path.join(out, entry), arcname=entry, filter=anonymous)
    shutil.rmtree(out)


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of this machine or this minute in the archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    sys.exit(main())
