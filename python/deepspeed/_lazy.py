"""Attribute access that imports on first use (PEP 562), so that `import deepspeed` stays cheap and silent."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def attach(
    package: str, submodules: Iterable[str] = (), attributes: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    submodules  names that stand for `package.name`.
    attributes  name -> the module it lives in, or "module:name" where it has another name there.
    """
    modules = frozenset(submodules)
    homes = dict(attributes or {})

    def __getattr__(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        home, _, other = homes[name].partition(":")
        value = getattr(importlib.import_module(home), other or name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *homes})

    return __getattr__, __dir__
