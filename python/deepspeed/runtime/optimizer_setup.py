"""The optimizer and the scheduler of a run: the client's, a callable's, or those the config names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from deepspeed import _native
from deepspeed._native import DeepSpeedConfigError

# What `initialize` takes in place of an optimizer and of a schedule.
DeepSpeedOptimizerCallable: TypeAlias = Callable[[Any], torch.optim.Optimizer]
DeepSpeedSchedulerCallable: TypeAlias = Callable[[torch.optim.Optimizer], Any]


def build_optimizer(
    client: Any, model_parameters: Any, model: torch.nn.Module, config: _native.Config
) -> torch.optim.Optimizer | None:
    """The basic optimizer; None where neither the client nor the config has one.

    client            a torch optimizer, or a callable that makes one from parameters or parameter groups.
    model_parameters  tensors or parameter groups; by default all trainable parameters of `model`.
    """
    if isinstance(client, torch.optim.Optimizer):
        return client
    parameters = _parameters(model_parameters, model)
    if client is not None:
        if not callable(client):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a callable, got {type(client).__name__}")
        made: Any = client(parameters)
        return made
    named = config.optimizer_class()
    if named is None or not parameters:
        return None
    return _construct("optimizer", named, parameters)


def build_scheduler(client: Any, optimizer: torch.optim.Optimizer | None, config: _native.Config) -> Any:
    """The schedule that the engine steps; None for a client that has its own elsewhere.

    client  a scheduler, or a callable that makes one from the basic optimizer.
    """
    if client is not None:
        if callable(client) and not hasattr(client, "step"):
            return client(optimizer)
        return client
    named = config.scheduler_class()
    if named is None or optimizer is None:
        return None
    return _construct("scheduler", named, optimizer)


def _parameters(given: Any, model: torch.nn.Module) -> list[Any]:
    if given is None:
        return [p for p in model.parameters() if p.requires_grad]
    if isinstance(given, torch.Tensor):
        return [given]
    if isinstance(given, dict):
        return [given]
    if not isinstance(given, Iterable):
        raise TypeError(f"model_parameters must be parameters or parameter groups, got {type(given).__name__}")
    return [p for p in given if isinstance(p, dict) or not isinstance(p, torch.Tensor) or p.requires_grad]


def _construct(block: str, named: tuple[str, dict[str, Any]], target: Any) -> Any:
    path, params = named
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if not isinstance(found, type):
        raise DeepSpeedConfigError(f"{block}.type is {name!r}, which is neither DeepSpeed's nor in {module}")
    try:
        return found(target, **params)
    except (TypeError, ValueError) as error:
        raise DeepSpeedConfigError(f"{block}.params do not fit {name}: {error}") from error
