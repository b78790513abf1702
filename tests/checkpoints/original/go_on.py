"""One rank of the original: goes on from a checkpoint in its layout, and writes its numbers to FOLDER/rankN.json.

Started by test_writing.py with the interpreter of DS_PEER_VENV.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

import deepspeed
from original_cases import all_cases
from original_model import AFTER, BEFORE, build, client_optimizer, groups, train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--case", required=True)
    parser.add_argument("--universal", action="store_true", help="load the universal checkpoint of the folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed("gloo")
    case = all_cases()[args.case]
    settings = {**case["config"], **({"checkpoint": {"load_universal": True}} if args.universal else {})}
    model = build(seed=999)
    if args.universal:
        # Of this format the original loads what is trained: frozen parameters and buffers stay as the script made them.
        model.frozen.load_state_dict(build().frozen.state_dict())
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=client_optimizer(case, model),
        model_parameters=groups(model),
        config=settings,
    )
    path, client = engine.load_checkpoint(args.folder)
    assert path is not None
    line = {
        "version": deepspeed.__version__,
        "epoch": client["epoch"],
        "calls": engine.module.calls.item(),
        "steps": engine.global_steps,
        **train(engine, rank, BEFORE, AFTER),
    }
    with open(os.path.join(args.folder, f"rank{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(line, file)


if __name__ == "__main__":
    main()
