"""One rank of the checkpoint benchmark: saves and loads a GPT's training state and prints `BENCH {json}` on rank 0.

    stands_still_s   in save_checkpoint, the median of the saves after the first
    save_s           until the checkpoint is complete
    load_s           load_checkpoint into an engine that has other values
    copy_s           a plain copy of the same files to the same disk, each synced, as `cp` and `sync` do, one thread a rank
    read_s           reading the same files, one thread a rank
    export_peak_mib  the most memory that `deepspeed checkpoint export` had, into files of at most export_shard_mib

Every rank copies and reads its share of the files. Times are those of the slowest rank.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time

import step_bench
import torch
from gpt import GPT

# Bytes of a file of an exported model.
SHARD = 64 << 20


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--stage", type=int, default=2)
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    p.add_argument("--width", type=int, default=768)
    p.add_argument("--layers", type=int, default=14)
    p.add_argument("--length", type=int, default=64)
    p.add_argument("--micro", type=int, default=1)
    p.add_argument("--saves", type=int, default=3)
    p.add_argument("--behind", action="store_true", help='"checkpoint": {"async": true}')
    p.add_argument("--folder", default=os.environ.get("DS_BENCH_FOLDER") or tempfile.gettempdir())
    a = p.parse_args()
    # What step_bench's config asks for beside these.
    a.accumulation, a.clip, a.offload = 1, 1.0, "none"
    return a


def everybody(value, reduce=max):
    """One number from all ranks."""
    import deepspeed

    tensor = torch.tensor([float(value)], dtype=torch.float64)
    parts = [torch.zeros_like(tensor) for _ in range(deepspeed.comm.get_world_size())]
    torch.distributed.all_gather(parts, tensor)
    return reduce(float(part) for part in parts)


def timed(work):
    """Seconds of the slowest rank, all starting together."""
    torch.distributed.barrier()
    began = time.perf_counter()
    work()
    return everybody(time.perf_counter() - began)


def files_of(folder, rank, world):
    """This rank's share of the files, the largest dealt out first."""
    found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    found.sort(key=lambda path: (-os.path.getsize(path), path))
    return found[rank::world]


def copy(files, target):
    for path in files:
        place = os.path.join(target, os.path.basename(path))
        with open(path, "rb") as source, open(place, "wb") as copied:
            shutil.copyfileobj(source, copied, 4 << 20)
            copied.flush()
            os.fsync(copied.fileno())


def read(files):
    buffer = bytearray(4 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def median(values):
    return sorted(values)[len(values) // 2]


def train(engine, generator, length, steps=1):
    for _ in range(steps):
        tokens = torch.randint(256, (1, length + 1), generator=generator)
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()


def export(saved, out):
    """`deepspeed checkpoint export` into files of at most SHARD bytes: the most memory it has, as the system counts it."""
    from deepspeed.launcher._native_command import find

    command = [str(find()), "checkpoint", "export", saved, out, "--max-shard-size", str(SHARD)]
    began = time.perf_counter()
    child = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise RuntimeError(f"{command} ended with {status}")
    return {
        "export_s": time.perf_counter() - began,
        "export_peak_mib": usage.ru_maxrss / 1024,
        "export_shard_mib": SHARD / (1 << 20),
    }


def main():
    a = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed()
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    model = GPT(a.width, a.layers, a.length)
    parameters = sum(p.numel() for p in model.parameters())
    settings = step_bench.config(a)
    if a.behind:
        settings["checkpoint"] = {"async": True}
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    wait = getattr(engine, "wait_for_checkpoint", lambda: None)
    generator = torch.Generator().manual_seed(rank)
    train(engine, generator, a.length, 2)

    scratch = os.path.join(a.folder, f"checkpoint-bench-{os.environ['MASTER_PORT']}")
    if rank == 0:
        os.makedirs(scratch)
    torch.distributed.barrier()
    try:
        still, saves, copies = [], [], []
        for turn in range(a.saves + 1):
            saved = os.path.join(scratch, "save")

            def save(saved=saved):
                began = time.perf_counter()
                engine.save_checkpoint(saved, tag=f"t{turn}")  # noqa: B023  called at once
                still.append(time.perf_counter() - began)
                if not a.behind:
                    # What a save leaves in memory counts as well: the original syncs nothing.
                    wait()

            began = timed(save)
            still[-1] = everybody(still[-1])
            rest = timed(wait)
            if not hasattr(engine, "wait_for_checkpoint"):
                rest = timed(lambda: sync_files(files_of(os.path.join(saved, f"t{turn}"), rank, world)))  # noqa: B023
            saves.append(began + rest)
            folder = os.path.join(saved, f"t{turn}")
            mine = files_of(folder, rank, world)
            target = os.path.join(scratch, "copy")
            os.makedirs(target, exist_ok=True)
            copies.append(timed(lambda: copy(mine, target)))  # noqa: B023
            if rank == 0:
                shutil.rmtree(target)
                if turn < a.saves:
                    shutil.rmtree(folder)
            torch.distributed.barrier()
            train(engine, generator, a.length)
        mine = files_of(os.path.join(saved, f"t{a.saves}"), rank, world)
        size = everybody(sum(os.path.getsize(path) for path in mine), sum)
        exported = {}
        if rank == 0 and not a.behind and hasattr(engine, "wait_for_checkpoint"):
            exported = export(saved, os.path.join(scratch, "model"))
        torch.distributed.barrier()
        loads, reads = [], []
        for _ in range(a.saves):
            loads.append(timed(lambda: engine.load_checkpoint(saved)))
            reads.append(timed(lambda: read(mine)))
            train(engine, generator, a.length)
    finally:
        torch.distributed.barrier()
        if rank == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(scratch)
    # The first save takes the memory that the later ones use again, as in a run that saves more than once.
    out = {
        "parameters": parameters,
        "bytes": int(size),
        "first_stands_still_s": still[0],
        "stands_still_s": median(still[1:]),
        "save_s": median(saves[1:]),
        "load_s": median(loads),
        "copy_s": median(copies[1:]),
        "read_s": median(reads),
        **exported,
    }
    if rank == 0:
        print("BENCH " + json.dumps(out), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def sync_files(files):
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


if __name__ == "__main__":
    main()
