"""One GPU: the scripts of tests/ecosystem, with the libraries' own devices instead of those for tests."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
sys.path[:0] = [str(Path(__file__).parents[1] / "ecosystem")]

STRATEGIES = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("script", ["run_lightning.py", "run_fabric.py"])
def test_lightning(script: str, strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from library_cases import lightning
    from library_play import play

    if script == "run_fabric.py" and strategy.endswith("offload"):
        pytest.skip("Fabric's script has a torch optimizer")
    case = lightning(script, strategy, "--precision=bf16-true", world=1)
    found = play("", tmp_path, case=case, env={"DS_ACCELERATOR": "cuda"})
    assert all(map(math.isfinite, found["losses"])) and found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from library_cases import ds_config, trainer
    from library_play import play

    case = trainer("llama", ds_config(stage), "--bf16", world=1)
    case.arguments.remove("--use_cpu")
    found = play("", tmp_path, case=case, env={"DS_ACCELERATOR": "cuda"})
    assert all(map(math.isfinite, found["losses"])) and found["losses"][-1] < found["losses"][0]
