"""The module's parameters as the native engine sees them: names, tensors, optimizer groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from deepspeed.utils.logging import logger


class TrainedParameters:
    """The parameters that the optimizer updates, in the order in which the module registered them.

    names    as `module.named_parameters()` has them; a tied parameter has the name under which it comes first.
    tensors  the parameters themselves.
    groups   for each, the index of the optimizer's parameter group.
    frozen   the others, by name.
    """

    def __init__(self, module: torch.nn.Module):
        self._named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._all = dict(module.named_parameters())
        self.names: list[str] = []
        self.tensors: list[torch.nn.Parameter] = []
        self.groups: list[int] = []
        self.frozen: dict[str, torch.nn.Parameter] = {}

    def select(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Keeps what `optimizer` updates; with None, everything that requires a gradient."""
        if optimizer is None:
            chosen = [(name, p, 0) for name, p in self._named]
        else:
            group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
            chosen = [(name, p, group_of.pop(id(p))) for name, p in self._named if id(p) in group_of]
            frozen = {id(p) for p in self._all.values() if not p.requires_grad}
            strangers = [index for parameter, index in group_of.items() if parameter not in frozen]
            if strangers:
                raise ValueError(
                    f"the optimizer has {len(strangers)} parameters that are not trainable parameters of the model "
                    f"(in parameter groups {sorted(set(strangers))}): build it from model.parameters()"
                )
            left_out = len(self._named) - len(chosen)
            if left_out:
                logger.info("%d trainable parameters are in no optimizer group and stay as they are", left_out)
        self.names = [name for name, _, _ in chosen]
        self.tensors = [p for _, p, _ in chosen]
        self.groups = [group for _, _, group in chosen]
        trained = {id(p) for p in self.tensors}
        self.frozen = {name: p for name, p in self._all.items() if id(p) not in trained}
        for name, parameter in zip(self.names, self.tensors, strict=True):
            if not parameter.is_contiguous():
                logger.info("parameter %s is made contiguous", name)
                parameter.data = parameter.data.contiguous()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a tensor, list, tuple, mapping or dataclass, at any depth."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def grad_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in `value` through which a backward pass can come."""
    return (tensor for tensor in tensors_in(value) if tensor.requires_grad)


def cast_floating(value: Any, dtype_for: Callable[[torch.dtype], torch.dtype]) -> Any:
    """Floating-point tensors in the dtype that `dtype_for` gives for theirs.

    A module's parameters are cast in place and its buffers keep their dtype; in anything else tensors are replaced,
    at any depth of lists, tuples and dicts.
    """
    if isinstance(value, torch.nn.Module):
        for parameter in value.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype_for(parameter.dtype))
        return value
    if isinstance(value, torch.Tensor):
        return value.to(dtype_for(value.dtype)) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast_floating(item, dtype_for) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(cast_floating(item, dtype_for) for item in value)
    return value


def cast_buffers(module: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Floating-point buffers in `dtype`, in place; with None they stay as they are, but for those of batch norms, which
    torch computes only where statistics and weights have one dtype."""
    for owner in module.modules():
        target = dtype
        if target is None and isinstance(owner, torch.nn.modules.batchnorm._NormBase) and owner.weight is not None:
            target = owner.weight.dtype
        if target is not None:
            for buffer in owner.buffers(recurse=False):
                if buffer.is_floating_point():
                    buffer.data = buffer.data.to(target)
