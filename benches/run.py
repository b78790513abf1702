"""Side-by-side benchmarks of this project, the original DeepSpeed and plain torch, on one machine in one go.

    make bench                      or    python benches/run.py --rounds 5 --write-docs

Every round runs every peer once, in rotating order, so that what else the machine does falls on all alike. Reported are
medians over the rounds with lowest and highest, and ratios taken within each round. The original is looked for in
DS_PEER_VENV, then in .peer (made by benches/peer-venv.sh .peer). A peer that is missing or fails is reported with the
reason.

Each run writes bench-results/TIME.json and bench-results/TIME.svg.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import joined
import plot
import processes
import report

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
WORLD = 2
GROUPS = ("startup", "import", "step", "large", "offload", "adam", "allreduce", "checkpoint")
LARGE = ["--width", "768", "--layers", "14", "--length", "64", "--micro", "1"]


def script(name: str) -> str:
    return os.path.join(HERE, name)


def versions(python: str) -> tuple[dict | None, str]:
    """Versions of deepspeed and torch of an interpreter, or the reason why it cannot be measured."""
    if not os.path.exists(python):
        return None, f"there is no {os.path.relpath(python)}"
    code = "import json, importlib.metadata as m\nprint(json.dumps({p: m.version(p) for p in ('deepspeed', 'torch')}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or ["it cannot start"])[-1]
    return json.loads(done.stdout), ""


def find_peers() -> tuple[dict[str, str], dict[str, dict], dict[str, str]]:
    """Interpreters by peer, their versions, and the reasons for the peers that are missing."""
    original = os.environ.get("DS_PEER_VENV") or os.path.join(ROOT, ".peer")
    candidates = {
        "ours": os.path.join(ROOT, ".venv", "bin", "python"),
        "original": os.path.join(original, "bin", "python"),
    }
    found, known, missing = {}, {}, {}
    for name, python in candidates.items():
        version, reason = versions(python)
        if version is None:
            hint = "make venv" if name == "ours" else "benches/peer-venv.sh .peer, or set DS_PEER_VENV"
            missing[name] = f"{reason} ({hint})"
        else:
            found[name], known[name] = python, version
    return found, known, missing


def cases(groups: list[str], peers: dict[str, str], torch_python: str, steps: int) -> list[tuple[str, str, callable]]:
    """(case, peer, measure) in order; measure() returns numbers by name."""
    out = []

    def add(case, peer, function, *arguments):
        out.append((case, peer, lambda: function(*arguments)))

    def step(python, *arguments, deadline=600.0):
        return processes.ranks(python, [script("step_bench.py"), "--steps", str(steps), *arguments], WORLD, deadline)

    if "startup" in groups:
        add(
            "startup", "python alone", processes.start_up, [torch_python], torch_python, script("first_line.py"), 1, 120
        )
        for peer, python in peers.items():
            launcher = os.path.join(os.path.dirname(python), "deepspeed")
            command = [
                launcher,
                "--num_gpus",
                str(WORLD),
                "--no_local_rank",
                "--master_port",
                str(processes.free_port()),
            ]
            add("startup", peer, processes.start_up, command, python, script("first_line.py"), WORLD, 120)
        torchrun = [os.path.join(os.path.dirname(torch_python), "torchrun"), "--nproc_per_node", str(WORLD)]
        add("startup", "torchrun", processes.start_up, torchrun, torch_python, script("first_line.py"), WORLD, 120)
    if "import" in groups:
        for peer, python in peers.items():
            add("import", peer, processes.single, python, [script("import_bench.py")], 120)
    for group, shape, dtypes, stages in (
        ("step", [], ("fp32", "bf16"), (0, 1, 2, 3)),
        ("large", LARGE, ("bf16",), (0, 1, 2, 3)),
    ):
        if group not in groups:
            continue
        for dtype in dtypes:
            for engine in ("bare", "ddp"):
                add(f"{group}/{dtype}", engine, step, torch_python, "--engine", engine, "--dtype", dtype, *shape)
            for stage in stages:
                for peer, python in peers.items():
                    add(
                        f"{group}/{dtype}/stage{stage}",
                        peer,
                        step,
                        python,
                        "--stage",
                        str(stage),
                        "--dtype",
                        dtype,
                        *shape,
                    )
    if "offload" in groups:
        add("offload/bare", "bare", step, torch_python, "--engine", "bare", "--dtype", "bf16", *LARGE)
        add("offload/stream", "ours", processes.state_stream, ROOT, 900)
        for stage, device in ((2, "cpu"), (3, "cpu"), (3, "nvme")):
            for peer, python in peers.items():
                options = ["--stage", str(stage), "--dtype", "bf16", "--offload", device, *LARGE]
                add(f"offload/stage{stage}/{device}", peer, step, python, *options)
    if "checkpoint" in groups:
        for peer, python in peers.items():
            save = [script("checkpoint_bench.py")]
            add("checkpoint", peer, processes.ranks, python, save, WORLD, 900)
            if peer == "ours":
                add("checkpoint", "ours behind", processes.ranks, python, [*save, "--behind"], WORLD, 900)
    if "adam" in groups:
        for peer, python in peers.items():
            add("adam", peer, processes.single, python, [script("adam_bench.py"), "--deepspeed"], 600)
    if "allreduce" in groups:
        for peer, python in peers.items():
            add("allreduce", peer, processes.ranks, python, [script("all_reduce_bench.py"), "--deepspeed"], WORLD, 300)
        add("allreduce", "ours", processes.engine_all_reduce, ROOT, 900)
    return out


def measure_round(turn: int, rounds: int, todo: list, results: dict, failed: dict) -> None:
    """Every case once, beginning with another one each round. Adds to `results`, or to `failed` for good."""
    shift = turn * len(todo) // rounds
    for case, peer, measure in todo[shift:] + todo[:shift]:
        key = f"{case}: {peer}"
        if key in failed:
            continue
        if sys.stderr.isatty():
            print(f"\r\x1b[Kround {turn + 1}/{rounds}  {key}", end="", file=sys.stderr, flush=True)
        try:
            numbers = measure()
        except processes.ChildFailed as error:
            failed[key] = str(error)
        else:
            results.setdefault(case, {}).setdefault(peer, []).append({"round": turn, **numbers})
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def machine() -> dict:
    cpu, memory = platform.processor() or platform.machine(), None
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        with open("/proc/meminfo", encoding="ascii") as file:
            memory = round(int(file.readline().split()[1]) / 2**20)
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run of the step benchmarks")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups to run, of {', '.join(GROUPS)}")
    parser.add_argument("--out", default=os.path.join(ROOT, "bench-results"))
    parser.add_argument("--write-docs", action="store_true", help="rewrite docs/benchmarks.md from this run")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="FILE",
        help="join an earlier run's JSON; with --rounds 0 only these",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    groups = args.only.split(",")
    if unknown := [group for group in groups if group not in GROUPS]:
        parser.error(f"unknown group {unknown[0]!r}: choose among {', '.join(GROUPS)}")

    peers, known, missing = find_peers()
    for peer, reason in missing.items():
        print(f"skipped: {peer}: {reason}", flush=True)
    if not peers:
        sys.exit("nothing to measure")
    torch_python = peers.get("ours") or next(iter(peers.values()))
    todo = cases(groups, peers, torch_python, args.steps)

    results: dict[str, dict[str, list[dict]]] = {}
    failed: dict[str, str] = {}
    try:
        for turn in range(args.rounds):
            measure_round(turn, args.rounds, todo, results, failed)
    except KeyboardInterrupt:
        failed["the run"] = "interrupted: what was measured before is reported"

    run = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": " ".join(["python", "benches/run.py", *sys.argv[1:]]),
        "machine": machine(),
        "versions": known,
        "rounds": args.rounds,
        "steps": args.steps,
        "missing": missing,
        "failed": failed,
        "results": {case: results[case] for case in sorted(results)},
    }
    if args.add:
        try:
            run = joined.join(run, [json.loads(pathlib.Path(path).read_text(encoding="utf-8")) for path in args.add])
        except (OSError, ValueError) as error:
            parser.error(f"--add: {error}")
    os.makedirs(args.out, exist_ok=True)
    name = os.path.join(args.out, time.strftime("%Y%m%d-%H%M%S"))
    with open(f"{name}.json", "w", encoding="utf-8") as file:
        json.dump(run, file, indent=1)
        file.write("\n")
    rows = report.rows(run)
    if rows:
        plot.bars(f"{name}.svg", f"Median and spread of {run['rounds']} rounds", report.bars(rows))
    print(report.text(run, rows))
    print(f"written: {os.path.relpath(name)}.json and .svg")
    if args.write_docs:
        with open(os.path.join(ROOT, "docs", "benchmarks.md"), "w", encoding="utf-8") as file:
            file.write(report.markdown(run, rows))
        if rows:
            shutil.copyfile(f"{name}.svg", os.path.join(ROOT, "docs", "benchmarks.svg"))
        print("written: docs/benchmarks.md and .svg")
    if not rows:
        sys.exit("no measurement succeeded")


if __name__ == "__main__":
    main()
