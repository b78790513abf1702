"""Learning-rate schedules of DeepSpeed's configs.

A schedule is at iteration -1 when it is made, and `step()` after each optimizer step moves it on; the first two
optimizer steps of a warm-up therefore run at its lowest rate.
"""

from __future__ import annotations

from typing import Any

import torch

from deepspeed import _native
from deepspeed.utils.logging import logger

LR_RANGE_TEST = "LRRangeTest"
ONE_CYCLE = "OneCycle"
WARMUP_LR = "WarmupLR"
WARMUP_DECAY_LR = "WarmupDecayLR"
WARMUP_COSINE_LR = "WarmupCosineLR"
VALID_LR_SCHEDULES: list[str] = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

LR_RANGE_TEST_MIN_LR = "lr_range_test_min_lr"
LR_RANGE_TEST_STEP_RATE = "lr_range_test_step_rate"
LR_RANGE_TEST_STEP_SIZE = "lr_range_test_step_size"
LR_RANGE_TEST_STAIRCASE = "lr_range_test_staircase"

CYCLE_MIN_LR = "cycle_min_lr"
CYCLE_MAX_LR = "cycle_max_lr"
DECAY_LR_RATE = "decay_lr_rate"
CYCLE_FIRST_STEP_SIZE = "cycle_first_step_size"
CYCLE_SECOND_STEP_SIZE = "cycle_second_step_size"
CYCLE_FIRST_STAIR_COUNT = "cycle_first_stair_count"
CYCLE_SECOND_STAIR_COUNT = "cycle_second_stair_count"
DECAY_STEP_SIZE = "decay_step_size"
CYCLE_MOMENTUM = "cycle_momentum"
CYCLE_MIN_MOM = "cycle_min_mom"
CYCLE_MAX_MOM = "cycle_max_mom"
DECAY_MOM_RATE = "decay_mom_rate"

WARMUP_MIN_LR = "warmup_min_lr"
WARMUP_MAX_LR = "warmup_max_lr"
WARMUP_NUM_STEPS = "warmup_num_steps"
WARMUP_TYPE = "warmup_type"
WARMUP_LOG_RATE = "log"
WARMUP_LINEAR_RATE = "linear"
WARMUP_MIN_RATIO = "warmup_min_ratio"
COS_MIN_RATIO = "cos_min_ratio"
TOTAL_NUM_STEPS = "total_num_steps"

PerGroup = float | list[float] | tuple[float, ...]


def get_torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself, or the one inside a wrapper that calls it `optimizer`."""
    inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else getattr(optimizer, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__qualname__} is not a torch.optim.Optimizer")
    return inner


class _Schedule:
    """Writes a native schedule's values to an optimizer's parameter groups.

    last_batch_iteration  iteration of the last `step()`; -1 before the first.
    """

    def __init__(self, name: str, optimizer: Any, params: dict[str, Any]):
        self.optimizer = get_torch_optimizer(optimizer)
        self._schedule = _native.Schedule(name, params)
        self._base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._last_lr: list[float] | None = None
        self.last_batch_iteration: int = self._schedule.start
        self.get_lr()  # refuses settings that do not fit the optimizer's groups
        if self.last_batch_iteration == -1:
            self._apply()

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at the current iteration."""
        return self._schedule.at(self.last_batch_iteration, self._base_lrs)[0]

    def get_last_lr(self) -> list[float]:
        """The rates last written to the optimizer, by group."""
        assert self._last_lr is not None, "need to call step() first"
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Moves to the next iteration, or to the one given, and writes its values to the optimizer."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: dict[str, int]) -> None:
        """Takes up a saved iteration, and writes its values to the optimizer."""
        self.last_batch_iteration = sd["last_batch_iteration"]
        self._apply()

    def _apply(self) -> None:
        rates, betas = self._schedule.at(self.last_batch_iteration, self._base_lrs)
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = rates[index]
            if betas is not None and "betas" in group:
                group["betas"] = betas[index]
        self._last_lr = rates


class LRRangeTest(_Schedule):
    """Rises from a low rate without end, to find the largest at which training is stable (Smith, 2015).

    lr = min_lr * (1 + step_rate * k), k the intervals of `step_size` iterations so far (whole ones with staircase).
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ):
        super().__init__(LR_RANGE_TEST, optimizer, _settings(locals()))


class OneCycle(_Schedule):
    """One rise and fall of the rate against one fall and rise of the momentum, then a decay (Smith, 2018).

    Step sizes are in iterations; `cycle_second_step_size` and `cycle_second_stair_count` are as the first when None.
    The momentum is the first beta; an optimizer without betas has only its rate cycled.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ):
        super().__init__(ONE_CYCLE, optimizer, _settings(locals()))
        if cycle_momentum and not any("betas" in group for group in self.optimizer.param_groups):
            logger.warning("OneCycle: %s has no betas, so no momentum is cycled", type(self.optimizer).__name__)

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each parameter group at the current iteration; None where momentum is not cycled."""
        return self._schedule.at(self.last_batch_iteration, self._base_lrs)[1]


class WarmupLR(_Schedule):
    """Rises from `warmup_min_lr` to `warmup_max_lr` (the group's own rate when None), and stays there.

    warmup_type  "log" or "linear" in the iteration, over `warmup_num_steps` of them.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ):
        super().__init__(WARMUP_LR, optimizer, _settings(locals()))


class WarmupDecayLR(_Schedule):
    """As WarmupLR, then falls linearly to `warmup_min_lr` at `total_num_steps` iterations."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ):
        super().__init__(WARMUP_DECAY_LR, optimizer, _settings(locals()))


class WarmupCosineLR(_Schedule):
    """The group's rate times a ratio that rises from `warmup_min_ratio` to 1, then falls as a cosine to
    `cos_min_ratio` at `total_num_steps` iterations.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ):
        super().__init__(WARMUP_COSINE_LR, optimizer, _settings(locals()))


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The schedule's own settings among a constructor's local names."""
    return {name: value for name, value in arguments.items() if name not in ("self", "optimizer", "__class__")}
