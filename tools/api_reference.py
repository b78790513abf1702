"""Writes docs/api.md, the reference of the public names, from their signatures and docstrings.

python tools/api_reference.py            writes the page
python tools/api_reference.py --check    fails if it is not what the docstrings say
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
WIDTH = 120

# The modules of the page, and what is shown of each.
MODULES: dict[str, list[str]] = {
    "deepspeed": ["initialize", "init_distributed", "add_config_arguments", "DeepSpeedEngine", "DeepSpeedConfig", "OnDevice"],
    "deepspeed.zero": ["Init", "GatheredParameters", "register_external_parameter"],
    "deepspeed.checkpointing": ["configure", "checkpoint", "non_reentrant_checkpoint", "reset"],
    "deepspeed.utils": [
        "RepeatingLoader", "log_dist", "set_z3_leaf_modules", "unset_z3_leaf_modules", "get_z3_leaf_modules",
        "safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state", "safe_set_full_fp32_param",
        "safe_set_full_grad", "safe_set_full_optimizer_state", "safe_get_local_fp32_param", "safe_get_local_grad",
        "safe_get_local_optimizer_state",
    ],
    "deepspeed.utils.timer": ["SynchronizedWallClockTimer", "ThroughputTimer"],
    "deepspeed.utils.zero_to_fp32": [
        "get_fp32_state_dict_from_zero_checkpoint", "convert_zero_checkpoint_to_fp32_state_dict",
        "load_state_dict_from_zero_checkpoint",
    ],
    "deepspeed.comm": [
        "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast",
        "barrier", "configure", "log_summary", "reset_log",
    ],
    "deepspeed.monitor.monitor": ["Monitor", "MonitorMaster"],
    "deepspeed.profiling.flops_profiler": ["FlopsProfiler", "get_model_profile"],
    "deepspeed.ops.adam": ["FusedAdam", "DeepSpeedCPUAdam"],
    "deepspeed.ops.adagrad": ["DeepSpeedCPUAdagrad"],
    "deepspeed.ops.lion": ["FusedLion", "DeepSpeedCPULion"],
    "deepspeed.ops.lamb": ["FusedLamb"],
    "deepspeed.runtime.lr_schedules": ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"],
}  # fmt: skip


def main() -> None:
    page = reference()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page:
            sys.exit("docs/api.md is stale; run: python tools/api_reference.py")
        return
    PAGE.write_text(page, encoding="utf-8")


def reference() -> str:
    """The page."""
    parts = ["# The Python package\n\nMade from the docstrings by tools/api_reference.py.\n"]
    for name, members in MODULES.items():
        module = find(name)
        parts.append(f"## `{name}`\n")
        for member in members:
            parts += entry(f"{name}.{member}", getattr(module, member))
    return "\n".join(parts)


def find(name: str) -> Any:
    """The module of this name, which may be an attribute of the package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(package), attribute)


def entry(path: str, thing: Any) -> list[str]:
    """A class with its public methods, or a function."""
    found = [f"### `{path}`\n", described(path.rpartition(".")[2], thing)]
    if not inspect.isclass(thing):
        return found
    for owner in inspect.getmro(thing):
        if not owner.__module__.startswith("deepspeed"):
            continue
        for name, member in vars(owner).items():
            if name.startswith("_") or getattr(thing, name, None) is None:
                continue
            if isinstance(member, property) and member.fget is not None and member.__doc__:
                found.append(f"- `.{name}`: {indented(member.__doc__)}\n")
            elif inspect.isfunction(member) and member.__doc__:
                found.append(f"- `.{name}{signature(member)}`: {indented(member.__doc__)}\n")
    return found


def described(name: str, thing: Any) -> str:
    text = inspect.cleandoc(thing.__doc__ or "")
    line = f"{name}{signature(thing)}"
    if len(line) > WIDTH:
        parameters = (str(parameter) for parameter in shown(thing))
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + ")"
    return f"```python\n{line}\n```\n\n```text\n{text}\n```\n"


def indented(doc: str) -> str:
    return " ".join(inspect.cleandoc(doc).split())


def shown(thing: Any) -> list[inspect.Parameter]:
    """The parameters without their types."""
    found = inspect.signature(thing).parameters.values()
    return [p.replace(annotation=inspect.Parameter.empty) for p in found if p.name != "self"]


def signature(thing: Any) -> str:
    return str(inspect.Signature(shown(thing)))


if __name__ == "__main__":
    main()
