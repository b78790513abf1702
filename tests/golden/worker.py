"""One rank of a golden run: trains every case with whichever `deepspeed` this interpreter has.

Started by ranks.py with the usual variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK). Appends one JSON
line per case to its own file.
"""

import argparse
import importlib
import json
import os
import traceback

import torch
from cases import CLIENT, STEPS, all_cases
from model import batch, build

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


def train(config: dict, rank: int) -> dict:
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
    for step in range(STEPS):
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--backend", help="passed to init_distributed; without it the engine chooses")
    parser.add_argument("--only", help="run the cases whose names contain this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(args.backend)
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "world": int(os.environ["WORLD_SIZE"])}
    with open(os.path.join(args.out, f"rank{rank}.jsonl"), "w", encoding="utf-8") as file:
        for name, config in {"versions": versions, **all_cases()}.items():
            if name == "versions":
                line = versions
            elif args.only and args.only not in name:
                continue
            else:
                try:
                    line = train(config, rank)
                except Exception as error:  # what the engine refuses is a result too
                    line = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            file.write(json.dumps({"name": name, "result": line}) + "\n")
            file.flush()
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
