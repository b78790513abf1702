"""One rank of the recording: trains, saves and trains on in every case of its world, with the original.

Started by record_original.py with the usual variables. Writes checkpoints to OUT/CASE and its numbers to OUT/CASE/rankN.json.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback

import torch

import deepspeed
from original_cases import all_cases, client_state
from original_model import AFTER, BEFORE, build, client_optimizer, groups, train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed("gloo")
    for name, case in all_cases().items():
        if case["world"] != world or args.only not in name:
            continue
        folder = os.path.join(args.out, name)
        os.makedirs(folder, exist_ok=True)
        try:
            model = build()
            engine, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=client_optimizer(case, model),
                model_parameters=groups(model),
                config=case["config"],
            )
            line = {"versions": [deepspeed.__version__, torch.__version__], "before": train(engine, rank, 0, BEFORE)}
            engine.save_checkpoint(folder, tag="step3", client_state=client_state(rank))
            line["skipped"] = engine.skipped_steps
            line["after"] = train(engine, rank, BEFORE, AFTER)
            engine.destroy()
        except Exception as error:  # what the original refuses is a result too
            line = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        with open(os.path.join(folder, f"rank{rank}.json"), "w", encoding="utf-8") as file:
            json.dump(line, file)
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
