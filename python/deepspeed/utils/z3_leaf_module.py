"""Leaf modules of stage 3: modules whose parameters are gathered together, whatever happens inside (experts, say).

Where the ranks of a host share one copy of the weights nothing is gathered, and a mark changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

_MARK = "_z3_leaf"


def z3_leaf_module(module: torch.nn.Module) -> bool:
    """Whether `module` is marked as a leaf."""
    return bool(getattr(module, _MARK, False))


def z3_leaf_parameter(parameter: torch.nn.Parameter) -> bool:
    """Whether `parameter` belongs to a leaf."""
    return hasattr(parameter, "ds_z3_leaf_module")


def get_z3_leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The marked modules of `model`."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: list[Any], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """Marks the modules of the given classes (or names of classes) as leaves and returns them."""
    return _mark(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: torch.nn.Module, leaf_module_classes: list[Any], raise_if_not_found: bool = True
) -> list[torch.nn.Module]:
    """Takes the marks back and returns the modules."""
    return _mark(model, leaf_module_classes, False, raise_if_not_found)


def mark_leaves(model: torch.nn.Module, config: dict[str, Any]) -> None:
    """Marks what `zero_optimization.leaf_module` names: classes, names of modules, and ends of such names."""
    block = config.get("zero_optimization")
    chosen = block.get("leaf_module") if isinstance(block, dict) else None
    if not chosen or chosen == "auto":
        return
    if chosen.get("classes"):
        set_z3_leaf_modules(model, chosen["classes"])
    names, suffixes = set(chosen.get("names", ())), tuple(chosen.get("name_suffixes", ()))
    _set_marks(
        [m for name, m in model.named_modules() if name in names or (suffixes and name.endswith(suffixes))], True
    )


def _mark(model: torch.nn.Module, classes: list[Any], leaf: bool, must_exist: bool) -> list[torch.nn.Module]:
    names = {entry for entry in classes if isinstance(entry, str)}
    types = tuple(entry for entry in classes if isinstance(entry, type))

    def chosen(module: torch.nn.Module) -> bool:
        kind = type(module)
        return isinstance(module, types) or kind.__name__ in names or f"{kind.__module__}.{kind.__qualname__}" in names

    found = [module for module in model.modules() if chosen(module)]
    if not found and must_exist:
        raise ValueError(f"no module of {classes} in the model: name classes of its modules")
    _set_marks(found, leaf)
    return found


def _set_marks(modules: list[torch.nn.Module], leaf: bool) -> None:
    for module in modules:
        setattr(module, _MARK, leaf)
        for parameter in module.parameters():
            if leaf:
                parameter.ds_z3_leaf_module = module  # type: ignore[attr-defined]
            elif hasattr(parameter, "ds_z3_leaf_module"):
                delattr(parameter, "ds_z3_leaf_module")
