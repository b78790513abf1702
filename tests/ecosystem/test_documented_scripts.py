"""What transformers' and accelerate's pages on DeepSpeed show beside the plain runs of test_ecosystem.py: inference without the
Trainer, a notebook's cell, a DeepSpeed config file named in accelerate's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from harness import run_ranks  # noqa: E402
from library_cases import CASES, PRELOAD, ds_config  # noqa: E402
from library_play import results, run_script, what_accelerate_launches  # noqa: E402
from test_ecosystem import RECORDED, assert_close  # noqa: E402

CPU = {"device": "cpu", "pin_memory": True}


def make_t5(folder: str) -> list[list[int]]:
    """Saves a T5; what it says to two sentences, 4 and 8 tokens of it, as an ordinary model."""
    sys.path[:0] = [str(HERE / "scripts")]
    from tiny_models import Examples, build

    torch.manual_seed(3)
    model = build("t5")
    model.save_pretrained(folder)
    sentences = [Examples("t5", 2)[rank]["input_ids"].unsqueeze(0) for rank in range(2)]
    said = [model.generate(s, do_sample=False, max_new_tokens=4 + 4 * rank) for rank, s in enumerate(sentences)]
    return [tokens[0].tolist() for tokens in said]


def test_inference_without_the_trainer(tmp_path: Path) -> None:
    (said,) = run_ranks(make_t5, 1, str(tmp_path / "t5"), preload=PRELOAD)
    run_ranks(run_script, 2, "run_inference.py", [str(tmp_path / "t5")], str(tmp_path), preload=PRELOAD)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == said


@pytest.mark.parametrize("stage", [2, 3])
def test_a_notebook(stage: int, tmp_path: Path) -> None:
    config = ds_config(stage, zero={"offload_optimizer": CPU, **({"offload_param": CPU} if stage == 3 else {})})
    run_ranks(run_script, 1, "run_notebook.py", [json.dumps(config)], str(tmp_path), preload=PRELOAD)
    losses = results(tmp_path / "out")["losses"]
    assert len(losses) == 8 and losses[-1] < losses[0]


FILE_IN_ACCELERATES_CONFIG = """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_config_file: ds_config.json
  zero3_init_flag: true
distributed_type: DEEPSPEED
downcast_bf16: 'no'
dynamo_backend: 'NO'
fsdp_config: {}
machine_rank: 0
main_process_port: 0
main_training_function: main
megatron_lm_config: {}
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""


def test_accelerate_with_a_deepspeed_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = CASES["accelerate-config"].config or {}
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    (tmp_path / "deepspeed.yaml").write_text(FILE_IN_ACCELERATES_CONFIG)
    script = str(HERE / "scripts/run_accelerate.py")
    _, env = what_accelerate_launches(["--config_file=deepspeed.yaml", script])
    run_ranks(run_script, 2, "run_accelerate.py", ["--output_dir=out"], str(tmp_path), preload=PRELOAD, env=env)
    found, recorded = results(tmp_path / "out"), RECORDED["accelerate-config"]
    assert_close("the loss", found["losses"], recorded["losses"], 1e-5)
    assert_close("the norm", found["norms"], recorded["norms"], 1e-4)
