"""transformers' Trainer, accelerate, PEFT and Lightning on scripts as their documentation shows them: the same losses as
with the original (recorded by record_libraries.py), and what only they would notice: saves, resumed runs, generation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("peft")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from harness import run_command  # noqa: E402
from library_cases import CASES, Case, ds_config, trainer  # noqa: E402
from library_play import play, results, what_accelerate_launches  # noqa: E402

RECORDED: dict[str, Any] = json.loads((HERE / "recorded.json").read_text())["cases"]
# Relative differences of losses and of gradient norms, over 8 steps.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 2e-2)}


def assert_close(what: str, ours: list[float], theirs: list[float], tolerance: float) -> None:
    assert len(ours) == len(theirs), (what, ours, theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert math.isclose(a, b, rel_tol=tolerance), f"{what} of step {step}: ours {a:.9g}, the original's {b:.9g}"


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_original(name: str, tmp_path: Path) -> None:
    found, recorded = play(name, tmp_path), RECORDED[name]
    assert all(map(math.isfinite, found["losses"]))
    if "error" in recorded:  # what the original cannot run is asked to learn
        assert found["losses"][-1] < found["losses"][0]
        return
    losses, norms = TOLERANCES[CASES[name].precision]
    assert_close("the loss", found["losses"], recorded["losses"], losses)
    assert ("rates" in found) == ("rates" in recorded)
    if "rates" in recorded:
        assert found["rates"] == pytest.approx(recorded["rates"], rel=1e-9)
    if recorded.get("norms"):
        assert_close("the norm", found["norms"], recorded["norms"], norms)
    if "eval" in recorded:
        assert_close("the evaluation", [found["eval"]], [recorded["eval"]], losses)
    assert found.get("exact") == recorded.get("exact")


def resumable(stage: int, *more: str, model: str = "gpt2", **config: Any) -> Case:
    """A run of 8 updates that saves after 3, in the middle of the first epoch."""
    case = trainer(model, ds_config(stage, **config), "--save_strategy=steps", "--save_steps=3", *more)
    return dataclasses.replace(case, arguments=[a for a in case.arguments if a != "--save_strategy=no"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_is_resumed_in_mid_epoch_goes_on_exactly(stage: int, tmp_path: Path) -> None:
    # The model has dropout here, so random states count, too.
    case = resumable(stage, "--dropout=0.1", "--gradient_accumulation_steps=2", "--examples=64")
    whole = play("", tmp_path / "whole", case=case)
    assert len(whole["losses"]) == 8
    resumed = play(
        "", tmp_path / "resumed", f"--resume_from_checkpoint={tmp_path / 'whole/out/checkpoint-3'}", case=case
    )
    # The log that is resumed has the first steps, too.
    assert resumed == whole


def test_a_lora_run_saves_adapters_and_resumes(tmp_path: Path) -> None:
    case = resumable(3, "--lora", model="llama")
    whole = play("", tmp_path / "whole", case=case)
    saved = tmp_path / "whole/out/checkpoint-3"
    resumed = play("", tmp_path / "resumed", f"--resume_from_checkpoint={saved}", case=case)
    assert resumed == whole
    from safetensors import safe_open

    with safe_open(tmp_path / "whole/out/adapter_model.safetensors", "pt") as adapter:
        assert all("lora_" in name for name in adapter.keys())  # noqa: SIM118
        elements = sum(adapter.get_tensor(name).numel() for name in adapter.keys())  # noqa: SIM118
    # Weights and two moments of what is trained, in fp32, and a padded header for each file; no frozen model.
    files = [*saved.glob("global_step3/weights-*"), *saved.glob("global_step3/optimizer-*")]
    assert len(files) == 4
    assert 3 * 4 * elements <= sum(path.stat().st_size for path in files) <= 3 * 4 * elements + 5 * 4096


def test_a_model_goes_through_save_and_from_pretrained_at_stage_3(tmp_path: Path) -> None:
    case = trainer("t5", ds_config(3), "--predict_with_generate", "--bf16")
    trained = play("", tmp_path / "trained", case=case)
    out = tmp_path / "trained/out"
    assert list(out.glob("*.safetensors"))
    # Evaluation alone: ZeRO-3 inference, with weights that no rank ever had whole.
    alone = dataclasses.replace(case, arguments=[a for a in case.arguments if a != "--do_train"], world=2)
    play_only(alone, tmp_path / "alone", f"--model_name_or_path={out}")
    metrics = json.loads((tmp_path / "alone/out/eval_results.json").read_text())
    assert metrics["eval_loss"] == trained["eval"] and metrics["eval_exact"] == trained["exact"]


def play_only(case: Case, folder: Path, *more: str) -> None:
    """Runs a case that leaves no history."""
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        play("", folder, *more, case=case)


def test_fp16_and_nvme(tmp_path: Path) -> None:
    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    plain = play("", tmp_path / "plain", case=trainer("llama", ds_config(3), "--fp16"))
    config = ds_config(3, zero={"offload_optimizer": disk, "offload_param": {**disk, "max_in_cpu": 0}})
    offloaded = play("", tmp_path / "offloaded", case=trainer("llama", config, "--fp16"))
    assert all(map(math.isfinite, plain["losses"])) and plain["losses"][-1] < plain["losses"][0]
    assert offloaded == plain


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_goes_on_from_a_state(stage: int, tmp_path: Path) -> None:
    # 12 micro-batches in three epochs; the state is of the middle of the second.
    case = Case(
        "run_accelerate.py",
        ["--output_dir=out", f"--zero_stage={stage}", "--gradient_accumulation_steps=2", "--epochs=3", "--seedable"],
    )
    whole = play("", tmp_path, "--save_at=3", case=case)
    assert len(whole["losses"]) == 12
    again = play("", tmp_path, f"--resume_from_checkpoint={tmp_path / 'out/step_3'}", case=case)
    assert again["losses"] == whole["losses"][6:] and again["norms"] == whole["norms"][3:]
    assert again["eval"] == whole["eval"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert sum(p.numel() for p in model.parameters()) > 10_000


def test_fabric_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = play("fabric-deepspeed", tmp_path)
    assert (tmp_path / "checkpoint/checkpoint").is_dir()
    again = play("fabric-deepspeed", tmp_path, "--resume")
    assert again["losses"] == whole["losses"][4:]


def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = play("lightning-stage2", tmp_path)
    again = play("lightning-stage2", tmp_path, "--ckpt_path=out/epochepoch=0.ckpt")
    assert again["losses"] == whole["losses"][4:] and again["eval"] == whole["eval"]
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    folder = tmp_path / "out/epochepoch=0.ckpt"
    state = convert_zero_checkpoint_to_fp32_state_dict(folder, tmp_path / "model.pt")
    assert state["epoch"] == 0 and all(name.startswith("model.") for name in state["state_dict"])


def test_two_models_with_two_configs(tmp_path: Path) -> None:
    found = play("", tmp_path, case=Case("run_two_models.py", []))
    assert found["teacher"] == "torch.bfloat16"
    assert all(map(math.isfinite, found["losses"])) and found["losses"][-1] < found["losses"][0]


# -- the commands ------------------------------------------------------------------------------------------------------

# What a user's shell would have; tests of one host need no more than two threads each.
SHELL = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
DEEPSPEED = os.environ.get("DEEPSPEED_COMMAND") or str(Path(sys.executable).parent / "deepspeed")


def test_the_deepspeed_command_starts_a_trainer(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text(json.dumps(CASES["trainer-gpt2-stage3"].config))
    script = str(HERE / "scripts/run_trainer.py")
    command = [DEEPSPEED, "--num_gpus", "2", script, *CASES["trainer-gpt2-stage3"].arguments]
    run_command(command, deadline=120, cwd=tmp_path, env=SHELL).check()
    assert_close("the loss", results(tmp_path / "out")["losses"], RECORDED["trainer-gpt2-stage3"]["losses"], 1e-5)


LAUNCH_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 2
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
"""


def test_accelerate_launch_starts_a_script(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.yaml").write_text(LAUNCH_CONFIG)
    arguments = ["--output_dir=out", "--gradient_accumulation_steps=2"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file=deepspeed.yaml",
        "--main_process_port=0",
    ]
    command = [*launch, str(HERE / "scripts/run_accelerate.py"), *arguments]
    run_command(command, deadline=120, cwd=tmp_path, env=SHELL).check()
    name = "accelerate-stage3-accumulate"
    assert_close("the loss", results(tmp_path / "out")["losses"], RECORDED[name]["losses"], 1e-5)


@pytest.mark.parametrize("launcher", ["nossh", "pdsh"])
def test_the_command_line_that_accelerate_builds_is_understood(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\nother slots=2\n")
    pdsh = tmp_path / "pdsh"  # a plan needs no more of it than that it is there
    pdsh.touch(mode=0o755)
    given = ["--use_deepspeed", "--num_machines=2", "--num_processes=4", "--machine_rank=0", "--main_process_port=0"]
    given += ["--main_process_ip=127.0.0.1", f"--deepspeed_hostfile={tmp_path / 'hosts'}", "--mixed_precision=no"]
    given += [f"--deepspeed_multinode_launcher={launcher}", "--dynamo_backend=no", "train.py", "--epochs=2"]
    command, _ = what_accelerate_launches(given)
    assert command[0] == "deepspeed"
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    plan = run_command([DEEPSPEED, "--dry_run", *command[1:]], cwd=tmp_path, env={"PATH": path}).check().stdout
    # accelerate asks for --local_rank with one of them only; its own scripts take none.
    ranks = {"nossh": "-u train.py --local_rank={} --epochs=2", "pdsh": "-u train.py --epochs=2"}[launcher]
    assert all(ranks.format(rank) in plan for rank in range(2)) and "WORLD_SIZE=4" in plan and "=127.0.0.1" in plan
