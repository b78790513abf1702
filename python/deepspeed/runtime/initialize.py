"""`deepspeed.initialize`: from a model and a config to an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepspeed._features import not_built
from deepspeed.comm import init_distributed
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.construction import shutdown_init_context

OptimizerArgument = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: OptimizerArgument = None,
    model_parameters: torch.nn.Module | Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | os.PathLike[str] | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | os.PathLike[str] | dict[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Makes the engine that trains `model`. Every rank calls it.

    args              a namespace whose `deepspeed_config` is the path of the config (see add_config_arguments).
    model             any torch.nn.Module; trained in place.
    optimizer         a torch optimizer, or a callable that makes one of parameters; by default the config's.
    model_parameters  what the optimizer updates: parameters or parameter groups; by default all that require
                      gradients.
    training_data     a dataset, for which a loader is made.
    lr_scheduler      a scheduler, or a callable that makes one of the optimizer; by default the config's. The
                      engine steps it after every update.
    distributed_port  port of the rendezvous where nothing else names one.
    mpu               the client's model-parallel unit; its model-parallel world must be one.
    collate_fn        how the loader makes a batch of samples.
    config            the config itself: a dict, a path, or base64 of JSON (`config_params` is an older name).

    Returns (engine, optimizer, loader of `training_data` or None, scheduler or None).
    """
    if model is None:
        raise AssertionError("deepspeed.initialize requires a model: pass model=")
    if mesh_param is not None:
        not_built("deepspeed.initialize(mesh_param=...)", "sequence and data parallelism on a mesh")
    if mpu is not None and mpu.get_model_parallel_world_size() != 1:
        not_built("deepspeed.initialize(mpu=...) with a model-parallel world above 1", "model parallelism")
    chosen = _choose_config(args, config, config_params)
    shutdown_init_context()
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    judged = DeepSpeedConfig(chosen, mpu)
    checkpointing.adopt(judged, mpu)
    engine = DeepSpeedEngine(
        args,
        model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=chosen,
        config_class=judged,
    )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _choose_config(args: Any, config: Any, config_params: Any) -> Any:
    """The one config among the places where it may be given."""
    if config is None:
        config = config_params
    named = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if named is not None and config is not None:
        raise AssertionError(
            f"two configs: args.deepspeed_config is {named!r}, and config= is given, too; leave one of them out"
        )
    if named is None and config is None:
        raise AssertionError(
            "no config: pass config= (a dict or a path), or args with deepspeed_config, which "
            "add_config_arguments(parser) and the option --deepspeed_config give"
        )
    return named if named is not None else config
