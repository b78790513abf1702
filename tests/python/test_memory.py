"""The memory estimators under the original's names, and the memory of this process."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from deepspeed import _native
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import (
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from deepspeed.runtime.zero.stage_1_and_2 import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)


def test_signatures_are_the_originals():
    shared = ["num_gpus_per_node", "num_nodes"]
    factor = "additional_buffer_factor"
    expected = {
        estimate_zero2_model_states_mem_needs: ["total_params", *shared, "cpu_offload", factor],
        estimate_zero2_model_states_mem_needs_all_live: ["model", *shared, factor],
        estimate_zero2_model_states_mem_needs_all_cold: ["total_params", *shared, factor],
        estimate_zero3_model_states_mem_needs: [
            "total_params",
            "largest_layer_params",
            *shared,
            "cpu_offload",
            "cpu_offload_params",
            "zero_init",
            factor,
        ],
        estimate_zero3_model_states_mem_needs_all_live: ["model", *shared, factor],
        estimate_zero3_model_states_mem_needs_all_cold: ["total_params", "largest_layer_params", *shared, factor],
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names, function.__name__
        assert parameters[factor].default == 1.5


def test_stage_2():
    # A float, as in the original's documentation. One rank: 2 bytes of weights stay, 16 of state move to the host.
    host, device = estimate_zero2_model_states_mem_needs(1e9, additional_buffer_factor=1.0)
    assert host == 16_000_000_000
    assert 2e9 < device < 2.5e9
    host, device = estimate_zero2_model_states_mem_needs(1e9, cpu_offload=False, num_gpus_per_node=4)
    assert host == 4e9 * 4 * 1.5, "every rank builds the model in fp32"
    assert 2e9 + 16e9 / 4 < device < 2.5e9 + 16e9 / 4


def test_stage_3():
    host, device, largest = estimate_zero3_model_states_mem_needs(1e9, 1e7, additional_buffer_factor=1.0)
    assert (host, largest) == (18_000_000_000, 40_000_000)
    assert device < 2e8
    _, device, _ = estimate_zero3_model_states_mem_needs(1e9, 1e7, num_gpus_per_node=2, num_nodes=2, cpu_offload=False)
    assert 16e9 / 4 < device < 17e9 / 4


def test_tables_of_a_model(capsys: pytest.CaptureFixture[str]):
    model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    model.add_module("tied", model[0])
    assert estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2) is None
    live = capsys.readouterr().out
    assert "1.01 M parameters, 1.00 M in the largest layer, 1 x 2 rank(s)" in live
    assert estimate_zero3_model_states_mem_needs_all_cold(1_011_010, 1_001_000, num_gpus_per_node=2) is None
    assert capsys.readouterr().out == live
    assert live.count("zero_init") == 6

    assert estimate_zero2_model_states_mem_needs_all_live(model) is None
    live = capsys.readouterr().out
    assert live.count("offload_optimizer=") == 2
    assert estimate_zero2_model_states_mem_needs_all_cold(1_011_010) is None
    assert capsys.readouterr().out == live


def test_sharded_parameters_count_whole():
    p = nn.Parameter(torch.empty(0))
    p.ds_numel = 12
    assert stage_1_and_2.elements([p, nn.Parameter(torch.empty(2, 2))]) == 16
    assert stage3.elements is stage_1_and_2.elements


def test_memory_in_use():
    before = _native.memory_in_use()
    held = torch.ones(16 << 20)
    now = _native.memory_in_use()
    assert now["total"] - before["total"] > 60 << 20
    assert held[-1] == 1
    assert set(now) == {"total", "anonymous", "file", "shared"}
