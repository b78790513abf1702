"""The schedule classes on torch optimizers. The numbers themselves are tested in crates/optim."""

from __future__ import annotations

import math

import pytest
import torch

import deepspeed
from deepspeed.runtime.lr_schedules import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR


def optimizer(lr: float = 0.01, kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule: WarmupLR | WarmupDecayLR | WarmupCosineLR | LRRangeTest | OneCycle, steps: int) -> list[float]:
    """What the optimizer holds for each of the first `steps` updates."""
    seen = []
    for _ in range(steps):
        seen.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.step()
    return seen


def test_names() -> None:
    assert deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES == [
        "LRRangeTest",
        "OneCycle",
        "WarmupLR",
        "WarmupDecayLR",
        "WarmupCosineLR",
    ]


def test_warm_up_holds_its_lowest_rate_for_two_updates() -> None:
    assert rates(WarmupLR(optimizer(), warmup_num_steps=4), 5) == pytest.approx(
        [0, 0, 0.005, 0.01 * math.log(3) / math.log(4), 0.01]
    )
    linear = WarmupLR(optimizer(), warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    assert rates(linear, 6) == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1])


def test_every_schedule_sets_the_optimizer_and_reports_it() -> None:
    for schedule in (
        WarmupLR(optimizer()),
        WarmupDecayLR(optimizer(), 100, warmup_num_steps=10),
        WarmupCosineLR(optimizer(), 100, warmup_num_steps=10),
        LRRangeTest(optimizer()),
        OneCycle(optimizer(), 0.1, 1.0),
    ):
        for _ in range(3):
            schedule.step()
        assert schedule.last_batch_iteration == 2
        assert schedule.get_lr() == schedule.get_last_lr() == [schedule.optimizer.param_groups[0]["lr"]]
        assert schedule.get_last_lr()[0] > 0
        schedule.step(7)
        assert schedule.state_dict() == {"last_batch_iteration": 7}


def test_one_cycle_cycles_betas_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = OneCycle(optimizer(), 0.1, 1.0, cycle_first_step_size=10)
    schedule.step()
    assert schedule.optimizer.param_groups[0]["betas"] == schedule.get_mom()[0]
    assert schedule.get_mom()[0][1] == 0.99
    plain = OneCycle(optimizer(kind=torch.optim.SGD), 0.1, 1.0)
    plain.step()
    assert "betas" not in plain.optimizer.param_groups[0]
    assert "SGD has no betas" in capsys.readouterr().out


def test_state_resumes() -> None:
    first = WarmupLR(optimizer(), warmup_num_steps=10)
    for _ in range(4):
        first.step()
    second = WarmupLR(optimizer(), warmup_num_steps=10)
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["lr"] == first.get_last_lr()[0]
    first.step()
    second.step()
    assert first.get_last_lr() == second.get_last_lr()


def test_a_started_schedule_has_no_last_rate_before_its_step() -> None:
    schedule = WarmupLR(optimizer(), last_batch_iteration=5)
    with pytest.raises(AssertionError, match=r"need to call step\(\) first"):
        schedule.get_last_lr()
    schedule.step()
    assert schedule.last_batch_iteration == 6
    assert len(schedule.get_last_lr()) == 1


def test_groups_have_their_own_rates() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.2)]
    schedule = WarmupLR(torch.optim.SGD(groups, lr=1.0), warmup_num_steps=2)
    for _ in range(4):
        schedule.step()
    assert schedule.get_last_lr() == [0.1, 0.2]
    with pytest.raises(ValueError, match="lists 3 values for 2 parameter groups"):
        WarmupLR(torch.optim.SGD(groups, lr=1.0), warmup_max_lr=[1.0, 2.0, 3.0])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="`warmup_num_steps` must be a positive integer, got 0"):
        WarmupLR(optimizer(), warmup_num_steps=0)
    with pytest.raises(TypeError, match="Linear is not a torch"):
        WarmupLR(torch.nn.Linear(1, 1))


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper:
        optimizer = optimizer()

    assert WarmupLR(Wrapper()).optimizer is Wrapper.optimizer
