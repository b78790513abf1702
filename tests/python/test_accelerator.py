"""`get_accelerator()` on a machine without devices, and its choice."""

from __future__ import annotations

import sys

import torch

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from harness import run_command


def test_the_cpu() -> None:
    cpu = CPU_Accelerator()
    assert (cpu.device_name(), cpu.device_name(1), cpu.current_device_name()) == ("cpu", "cpu", "cpu")
    assert cpu.communication_backend_name() == "gloo"
    assert cpu.is_available()
    assert cpu.device_count() >= 1
    # The kernel keeps both only roughly, so the peak may read a little below the present.
    assert 0 < cpu.memory_allocated() < cpu.total_memory()
    assert 0 < cpu.max_memory_allocated() < cpu.total_memory()
    assert 0 < cpu.available_memory() <= cpu.total_memory()
    assert cpu.supported_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    assert cpu.is_synchronized_device()
    cpu.synchronize()
    cpu.empty_cache()
    with cpu.stream(cpu.current_stream()), cpu.device(0):
        pass
    state = cpu.get_rng_state()
    first = torch.rand(3)
    cpu.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))
    assert cpu.FloatTensor([1, 2]).dtype == torch.float32
    environment: dict[str, str] = {}
    cpu.set_visible_devices_envs(environment, [1, 3])
    assert environment == {"CUDA_VISIBLE_DEVICES": "1,3"}


def test_the_choice_is_made_once_and_can_be_named() -> None:
    program = (
        "from deepspeed.accelerator import get_accelerator, set_accelerator, is_current_accelerator_supported\n"
        "from deepspeed.accelerator.real_accelerator import get_accelerator as same\n"
        "assert same() is get_accelerator() and is_current_accelerator_supported()\n"
        "print(get_accelerator().device_name())\n"
    )
    for name in ("cpu", "cuda"):
        assert run_command([sys.executable, "-c", program], env={"DS_ACCELERATOR": name}).check().stdout == f"{name}\n"
    refused = run_command([sys.executable, "-c", program], env={"DS_ACCELERATOR": "abacus"})
    assert "DS_ACCELERATOR is 'abacus', expected one of cpu, cuda" in refused.stderr
