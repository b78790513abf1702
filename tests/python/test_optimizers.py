"""The optimizers of `deepspeed.ops` used alone, against torch's and against their formulas."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepspeed import _native
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from harness import run_ranks

# Sizes around the kernels' chunks, among them none and one element.
SIZES = [(3, 5), (1,), (0,), (70000,), (257, 300)]
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def train(make: Make, steps: int = 5, dtype: torch.dtype = torch.float32) -> tuple[list[torch.nn.Parameter], Any]:
    params = parameters(dtype)
    optimizer = make(params)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
    return params, optimizer


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda p: DeepSpeedCPUAdam(p, lr=0.01, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
        (
            lambda p: FusedAdam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, adam_w_mode=False),
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        ),
        (
            lambda p: DeepSpeedCPUAdagrad(p, lr=0.01, weight_decay=0.1),
            lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
        ),
    ],
    ids=["AdamW", "Adam", "Adagrad"],
)
def test_as_torch(ours: Make, theirs: Make) -> None:
    mine, optimizer = train(ours)
    expected, reference = train(theirs)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
        for name, value in reference.state[b].items():
            torch.testing.assert_close(optimizer.state[a][name], value, rtol=2e-6, atol=1e-7)


def test_lion_by_its_formula() -> None:
    for kind in (FusedLion, DeepSpeedCPULion):
        params, _ = train(lambda p, kind=kind: kind(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1))
        generator = torch.Generator().manual_seed(2)
        expected = [param.detach().clone() for param in parameters()]
        momenta = [torch.zeros_like(param) for param in expected]
        for _ in range(5):
            for param, momentum in zip(expected, momenta, strict=True):
                grad = torch.randn(param.shape, generator=generator)
                direction = (0.9 * momentum + 0.1 * grad).sign()
                param.mul_(1 - 0.01 * 0.1).sub_(0.01 * direction)
                momentum.mul_(0.99).add_(grad, alpha=0.01)
        for a, b in zip(params, expected, strict=True):
            # A direction of nearly zero may have either sign.
            assert (a - b).abs().gt(1e-5).float().mean().nan_to_num() < 1e-4


def test_lamb_scales_adam_by_a_trust_ratio() -> None:
    params, _ = train(lambda p: FusedLamb(p, lr=0.01, weight_decay=0.1), steps=1)
    generator = torch.Generator().manual_seed(2)
    for before, after in zip(parameters(), params, strict=True):
        grad = torch.randn(before.shape, generator=generator)
        if before.numel() == 0:
            continue
        # As in the original, the bias corrections are in the step's length, not in the moments.
        direction = 0.1 * grad / ((0.001 * grad**2).sqrt() + 1e-8) + 0.1 * before.detach()
        ratio = (before.norm() / direction.norm()).clamp(0.01, 10)
        length = 0.01 * ratio * 0.001**0.5 / 0.1
        torch.testing.assert_close(after.detach(), before.detach() - length * direction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_parameters_keep_fp32_state(dtype: torch.dtype) -> None:
    params, optimizer = train(lambda p: DeepSpeedCPUAdam(p, lr=0.01), steps=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    for before, after in zip(parameters(dtype), params, strict=True):
        grad = torch.randn(before.shape, generator=generator).to(dtype).float()
        state = optimizer.state[after]
        assert after.dtype == dtype
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        torch.testing.assert_close(state["exp_avg"], grad * 0.1)
        expected = before.detach().float() - 0.01 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(after.detach(), expected.to(dtype), rtol=1e-2, atol=1e-4)


def test_threads_change_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = train(lambda p: FusedLamb(p, weight_decay=0.1))
        torch.set_num_threads(3)
        three, _ = train(lambda p: FusedLamb(p, weight_decay=0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_state_resumes_bit_exactly_and_stays_fp32() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params, optimizer = train(lambda p: DeepSpeedCPUAdam(p, lr=0.01), dtype=dtype)
        twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = DeepSpeedCPUAdam(twins)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for param, twin in zip(params, twins, strict=True):
            grad = torch.full_like(param, 0.3)
            param.grad, twin.grad = grad, grad.clone()
        optimizer.step()
        resumed.step()
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(param, twin)
            assert resumed.state[twin]["exp_avg"].dtype == torch.float32
            assert torch.equal(optimizer.state[param]["exp_avg"], resumed.state[twin]["exp_avg"])
            assert resumed.state[twin]["step"].item() == 6


def test_torchs_state_and_plain_integer_steps_load() -> None:
    params, reference = train(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0))
    state = copy.deepcopy(reference.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = DeepSpeedCPUAdam(twins, lr=0.01)
    resumed.load_state_dict(state)
    for param, twin in zip(params, twins, strict=True):
        param.grad = torch.full_like(param, 0.3)
        twin.grad = torch.full_like(param, 0.3)
    reference.step()
    resumed.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=2e-6, atol=1e-7)


def test_groups_closures_missing_gradients_and_torch_schedulers() -> None:
    first, second, third = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = FusedAdam([{"params": [first, third]}, {"params": [second], "lr": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (first + second).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8
    schedule.step()
    assert torch.allclose(first, torch.full((4,), 0.9))
    assert torch.equal(second, torch.ones(4))
    assert third not in optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert FusedAdam.ds_kind == "Adam"


def test_wrong_settings_and_tensors_are_named() -> None:
    param = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="amsgrad"):
        DeepSpeedCPUAdam([param], amsgrad=True)
    with pytest.raises(ValueError, match="`lr` must be a number of at least 0, got -1"):
        FusedAdam([param], lr=-1.0)
    with pytest.raises(ValueError, match="gradient_clipping"):
        FusedLamb([param], max_grad_norm=1.0)
    turned = torch.nn.Parameter(torch.ones(2, 4).t())
    turned.grad = torch.ones(4, 2)
    with pytest.raises(ValueError, match="parameter 0` is not contiguous"):
        FusedAdam([turned]).step()
    double = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    double.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        FusedAdam([double]).step()
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        FusedAdam(embedding.parameters()).step()


def test_the_native_call_refuses_what_would_be_unsound() -> None:
    one, two = torch.zeros(4), torch.zeros(4)
    group = {"lr": 0.1}

    def step(params: list[torch.Tensor], grads: list[torch.Tensor], states: list[list[torch.Tensor]]) -> None:
        _native.optimizer_step("Lion", group, params, grads, states, [1] * len(params), 1)

    with pytest.raises(ValueError, match="share memory"):
        step([one, one], [two, two], [[torch.zeros(4)], [torch.zeros(4)]])
    with pytest.raises(ValueError, match="share memory"):
        step([one], [two], [[one]])
    with pytest.raises(ValueError, match="4 elements, its gradient 3"):
        step([one], [torch.zeros(3)], [[torch.zeros(4)]])
    with pytest.raises(ValueError, match="optimizer state is fp32"):
        step([one], [two], [[torch.zeros(4, dtype=torch.bfloat16)]])
    with pytest.raises(ValueError, match="expected exp_avg"):
        step([one], [two], [[]])
    with pytest.raises(ValueError, match="1 parameters, 0 gradients"):
        step([one], [], [[]])


def update_on_threads() -> float:
    # torch's own operations stay on one thread: its OpenMP threads do not survive a fork.
    param, grad, momentum = torch.ones(300_000), torch.ones(300_000), torch.zeros(300_000)
    _native.optimizer_step("Lion", {"lr": 0.1}, [param], [grad], [[momentum]], [1], 2)
    return param[-1].item()


def update_then_fork() -> float:
    value = update_on_threads()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if update_on_threads() == value else 1)
    assert os.waitpid(pid, 0)[1] == 0
    return value


def test_threads_survive_a_fork() -> None:
    assert run_ranks(update_then_fork, 1, deadline=30) == [pytest.approx(0.9)]
