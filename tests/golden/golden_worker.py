"""One rank of a golden run: trains every case with whichever `deepspeed` this interpreter has.

Under the harness the ranks call `run_cases`. As a script, started by golden_ranks.py with the usual variables (RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK), it appends one JSON line per case to its own file.
"""

import argparse
import importlib
import json
import os
import traceback
from collections.abc import Iterator

import torch
from golden_cases import CLIENT, STEPS, all_cases
from golden_model import batch, build

import deepspeed


def number(value) -> float | None:
    """Nine significant digits identify an fp32 value."""
    return None if value is None else float(f"{float(value):.9g}")


def weights(module) -> dict[str, list[float]]:
    """Per parameter: sum, L2 norm, and the first, middle and last value."""
    out = {}
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        for name, parameter in module.named_parameters():
            flat = parameter.detach().double().flatten()
            out[name] = [number(v) for v in (flat.sum(), flat.norm(), flat[0], flat[flat.numel() // 2], flat[-1])]
    return out


def train(config: dict, rank: int, steps: int = STEPS) -> dict:
    model = build()
    out = {"initial": weights(model), "losses": [], "norms": [], "rates": [], "momentum": []}
    client = config.pop(CLIENT, None)
    if client is not None:
        module, name, arguments = client
        client = getattr(importlib.import_module(module), name)(model.parameters(), **arguments)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=client, model_parameters=model.parameters(), config=config
    )
    accumulation = engine.gradient_accumulation_steps()
    for step in range(steps):
        out["rates"].append(number(optimizer.param_groups[0]["lr"]))
        betas = optimizer.param_groups[0].get("betas")
        out["momentum"].append(number(betas[0]) if betas else None)
        total = 0.0
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            loss = engine(*batch(micro_step, rank))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        out["losses"].append(number(total / accumulation))
        out["norms"].append(number(engine.get_global_grad_norm()))
    out["final"] = weights(engine.module)
    out["skipped"] = engine.skipped_steps
    engine.destroy()
    return out


def run_cases(only: str = "", backend: str | None = None, steps: int = STEPS) -> Iterator[tuple[str, dict]]:
    """(name, result) of "versions" and of every case whose name contains `only`."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(backend)
    world = int(os.environ["WORLD_SIZE"])
    yield "versions", {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "world": world}
    for name, config in all_cases().items():
        if only in name:
            try:
                yield name, train(config, rank, steps)
            except Exception as error:  # what the engine refuses is a result too
                yield name, {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    torch.distributed.barrier()


def results(only: str, backend: str | None, steps: int) -> dict[str, dict]:
    return dict(run_cases(only, backend, steps))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--backend", help="passed to init_distributed; without it the engine chooses")
    parser.add_argument("--only", default="", help="run the cases whose names contain this")
    args = parser.parse_args()
    with open(os.path.join(args.out, f"rank{os.environ['RANK']}.jsonl"), "w", encoding="utf-8") as file:
        for name, result in run_cases(args.only, args.backend):
            file.write(json.dumps({"name": name, "result": result}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
