"""Names of the original that import but whose feature is not built: using one raises one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


class FeatureNotBuiltError(NotImplementedError):
    """A feature of the original that this version does not have. `feature` is its name, `used` what was called."""

    def __init__(self, used: str, feature: str):
        self.used = used
        self.feature = feature
        super().__init__(
            f"{used} needs {feature}, which this version of deepspeed does not have; "
            "docs/migration.md says what to use instead"
        )


class FeatureModuleError(FeatureNotBuiltError, ImportError):
    """An import of a module of a feature that is not built: also an ImportError, which programs that can do without
    expect."""


def not_built_module(name: str, feature: str) -> NoReturn:
    """Raises FeatureModuleError for the import of the module `name`."""
    raise FeatureModuleError(f"import {name}", feature)


def not_built(used: str, feature: str) -> NoReturn:
    """Raises FeatureNotBuiltError for `used`."""
    raise FeatureNotBuiltError(used, feature)


def unbuilt_function(used: str, feature: str) -> Callable[..., NoReturn]:
    """A function that raises FeatureNotBuiltError whatever it is given."""

    def function(*_args: Any, **_kwargs: Any) -> NoReturn:
        not_built(used, feature)

    module, _, function.__name__ = used.rpartition(".")
    function.__qualname__ = function.__name__
    function.__module__ = module
    function.__doc__ = f"Not built: needs {feature}."
    return function


def unbuilt_class(used: str, feature: str) -> type[Any]:
    """A class fit for isinstance and annotations, whose construction raises FeatureNotBuiltError."""

    def construct(_cls: type, *_args: Any, **_kwargs: Any) -> NoReturn:
        not_built(used, feature)

    module, _, name = used.rpartition(".")
    return type(name, (), {"__new__": construct, "__module__": module, "__doc__": f"Not built: needs {feature}."})
