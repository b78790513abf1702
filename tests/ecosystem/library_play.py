"""Runs a case's script on forked ranks and reads what it has written; with whichever deepspeed this interpreter has."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from library_cases import CASES, PRELOAD, Case

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"
sys.path[:0] = [str(SCRIPTS)]
# Set while the original is recorded.
RECORDING = "ECOSYSTEM_RECORDING"


def play(
    name: str, folder: Path, *more: str, case: Case | None = None, deadline: float = 120, **options: Any
) -> dict[str, Any]:
    """The losses, norms and metrics of a case, run in `folder`; `more` are further arguments of the script."""
    case = case or CASES[name]
    folder.mkdir(exist_ok=True)
    if case.config is not None:
        (folder / "ds_config.json").write_text(json.dumps(case.config))
    arguments = [*case.arguments, *more]
    run_ranks(
        run_script, case.world, case.script, arguments, str(folder), deadline=deadline, preload=PRELOAD, **options
    )
    return results(folder / "out")


def run_script(script: str, arguments: list[str], folder: str) -> None:
    """What `python script arguments` does on this rank."""
    import torch

    torch.set_num_threads(1)
    if os.environ.get(RECORDING):
        # On a CPU the Trainer makes torch's process group without the original's knowing; its zero.Init then counts one rank.
        import deepspeed

        deepspeed.init_distributed("gloo")
    os.chdir(folder)
    path = str(SCRIPTS / script)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # rank 0 has the store: it stays until all are done


def results(out: Path) -> dict[str, Any]:
    """What the script has left in its output folder."""
    if (out / "results.json").exists():
        found: dict[str, Any] = json.loads((out / "results.json").read_text())
        return found
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    found = {
        "losses": [entry["loss"] for entry in steps],
        # The original has none in fp32 at stage 0.
        "norms": [entry["grad_norm"] for entry in steps if "grad_norm" in entry],
        "rates": [entry["learning_rate"] for entry in steps],
    }
    if (out / "eval_results.json").exists():
        metrics = json.loads((out / "eval_results.json").read_text())
        found["eval"] = metrics["eval_loss"]
        if "eval_exact" in metrics:
            found["exact"] = metrics["eval_exact"]
    return found


def what_accelerate_launches(arguments: list[str]) -> tuple[list[str] | None, dict[str, str]]:
    """The command that `accelerate launch` would run (None: torchrun), and its variables in the environment."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    with pytest.MonkeyPatch.context() as patch:
        taken: list[Any] = []
        patch.setattr(launch, "deepspeed_launcher", taken.append)
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    command, environment = prepare_deepspeed_cmd_env(taken[0])
    return command, {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}
