"""DeepSpeedConfig: its sources, its attributes, its errors. Judging itself is tested in crates/config."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.00015, "betas": [0.9, 0.95]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    "fp16": {"enabled": True, "initial_scale_power": 8},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
    "gradient_clipping": 0.5,
    "communication_data_type": "bf16",
    "steps_per_print": float("inf"),
    "checkpoint": {"tag_validation": "FAIL"},
}


def check(config: DeepSpeedConfig) -> None:
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        8,
        4,
        2,
    )
    assert (config.optimizer_name, config.optimizer_params) == ("Adam", CONFIG["optimizer"]["params"])
    assert (config.scheduler_name, config.scheduler_params) == ("WarmupLR", {"warmup_num_steps": 10})
    assert (config.fp16_enabled, config.bfloat16_enabled, config.dynamic_loss_scale) == (True, False, True)
    assert config.initial_dynamic_scale == 256
    assert (config.zero_enabled, config.zero_optimization_stage) == (True, 2)
    assert (config.zero_config.stage, config.zero_config.reduce_bucket_size) == (2, 1000)
    assert config.gradient_clipping == 0.5
    assert config.communication_data_type is torch.bfloat16
    assert config.steps_per_print is None
    assert config.checkpoint_tag_validation_fail


def test_from_a_dict_a_file_and_base64(config_file: Callable[[dict[str, Any]], Path]) -> None:
    check(DeepSpeedConfig(CONFIG))
    assert DeepSpeedConfig(CONFIG)._param_dict == CONFIG
    path = config_file(CONFIG)
    check(DeepSpeedConfig(path))
    check(DeepSpeedConfig(str(path)))
    assert DeepSpeedConfig(path)._param_dict["zero_optimization"] == CONFIG["zero_optimization"]
    check(DeepSpeedConfig(base64.urlsafe_b64encode(json.dumps(CONFIG).encode()).decode()))


def test_infinities_in_a_file_are_floats(tmp_path: Path) -> None:
    text = '{"train_batch_size": 8, "steps_per_print": Infinity, "_mine": [-Infinity, NaN, 5e8, 3, -2, null, true, "Infinity"]}'
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    raw, read = DeepSpeedConfig(path)._param_dict, json.loads(text)
    assert repr(raw) == repr(read)
    assert raw["steps_per_print"] == float("inf")
    json.dumps(raw)


def test_every_annotated_attribute_is_there() -> None:
    config = DeepSpeedConfig(CONFIG)
    for name in DeepSpeedConfig.__annotations__:
        assert hasattr(config, name), name


def test_the_world_of_an_mpu() -> None:
    class Mpu:
        def get_data_parallel_world_size(self) -> int:
            return 2

    config = DeepSpeedConfig({"train_batch_size": 8}, mpu=Mpu())
    assert (config.world_size, config.train_micro_batch_size_per_gpu) == (2, 4)


def test_errors_say_where_and_what(config_file: Callable[[dict[str, Any]], Path]) -> None:
    assert issubclass(DeepSpeedConfigError, ValueError)
    assert deepspeed.DeepSpeedConfigError is DeepSpeedConfigError
    path = config_file({"train_batch_size": 8, "gradient_clipp1ng": 1})
    with pytest.raises(DeepSpeedConfigError) as raised:
        DeepSpeedConfig(path)
    assert "gradient_clipp1ng" in str(raised.value)
    assert "did you mean `gradient_clipping`?" in str(raised.value)
    assert f"{path}:1:" in str(raised.value)
    with pytest.raises(DeepSpeedConfigError, match="train_batch_size"):
        DeepSpeedConfig({})
    with pytest.raises(DeepSpeedConfigError, match="neither an existing file nor base64"):
        DeepSpeedConfig("no/such/file.json")
    with pytest.raises(DeepSpeedConfigError, match="not a list"):
        DeepSpeedConfig([])


def test_unknown_keys_may_be_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DS_CONFIG_STRICT", "0")
    DeepSpeedConfig({"train_batch_size": 8, "gradient_clipp1ng": 1})
    assert "gradient_clipp1ng" in capsys.readouterr().out
