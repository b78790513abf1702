"""The stubs in `_native/` say what the extension module has: every name, every parameter, both ways."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deepspeed import _native

INSTALLED = Path(_native.__file__).parent
# What every class has, whether its author says so or not.
BOOKKEEPING = {"__doc__", "__module__", "__weakref__"}
SUBCLASSABLE = 1 << 10  # Py_TPFLAGS_BASETYPE

Declarations = dict[str, str]


def in_stub(source: str) -> Declarations:
    found: Declarations = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            final = "final " if "final" in names_of(node.decorator_list) else ""
            found[node.name] = f"{final}class({', '.join(names_of(node.bases))})"
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = stub_member(member)
                elif isinstance(member, ast.AnnAssign):
                    found[f"{node.name}.{ast.unparse(member.target)}"] = "value"
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = f"({stub_parameters(node.args)})"
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = "value"
    return found


def names_of(nodes: list[ast.expr]) -> list[str]:
    return [ast.unparse(node) for node in nodes]


def stub_member(node: ast.FunctionDef) -> str:
    decorators = names_of(node.decorator_list)
    if "property" in decorators:
        return "property"
    if "staticmethod" in decorators:
        return f"static ({stub_parameters(node.args)})"
    node.args.args.pop(0)
    return f"({stub_parameters(node.args)})"


def stub_parameters(arguments: ast.arguments) -> str:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def in_module(module: ModuleType) -> Declarations:
    found: Declarations = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, type):
            final = "" if value.__flags__ & SUBCLASSABLE else "final "
            bases = [base.__name__ for base in value.__bases__ if base is not object]
            found[name] = f"{final}class({', '.join(bases)})"
            members = vars(value).items()
            found |= {f"{name}.{key}": member_of(value, key, it) for key, it in members if key not in BOOKKEEPING}
        elif callable(value):
            found[name] = f"({parameters(value)})"
        else:
            found[name] = "value"
    return found


def member_of(owner: type, name: str, member: Any) -> str:
    if name == "__new__":
        return f"({parameters(owner)})"
    if inspect.isgetsetdescriptor(member):
        return "property"
    if isinstance(member, staticmethod):
        return f"static ({parameters(member.__func__)})"
    return f"({parameters(member, bound=1)})"


def parameters(function: Any, bound: int = 0) -> str:
    """The parameters as they are written; `bound` of them belong to the object."""
    signature = inspect.signature(function)
    kept = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()][bound:]
    return str(inspect.Signature(kept))[1:-1]


def differences(stub: Declarations, module: Declarations) -> list[str]:
    return [
        f"{name}: {stub.get(name, 'missing')} in the stub, {module.get(name, 'missing')} in the module"
        for name in sorted(stub.keys() | module.keys())
        if stub.get(name) != module.get(name)
    ]


def installed_stub() -> str:
    """What `_native/__init__.pyi` hands on, in one."""
    listed = ast.parse((INSTALLED / "_native/__init__.pyi").read_text()).body
    parts = [node.module for node in listed if isinstance(node, ast.ImportFrom) and names_of_import(node) == ["*"]]
    files = [INSTALLED / "_native" / f"{str(part).removeprefix('deepspeed._native.')}.pyi" for part in parts]
    return "\n".join(file.read_text() for file in files)


def names_of_import(node: ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names]


def test_the_package_carries_its_types() -> None:
    assert (INSTALLED / "py.typed").is_file()
    assert sum(1 for _ in INSTALLED.glob("_native/*.pyi")) > 1
    # To Python the folder is nothing: what it holds cannot be imported.
    assert Path(_native.__file__).suffix == ".so" and not hasattr(_native, "__path__")


def test_stub_and_module_declare_the_same() -> None:
    assert differences(in_stub(installed_stub()), in_module(_native)) == []


def test_everything_in_the_stub_is_documented() -> None:
    declared = ast.walk(ast.parse(installed_stub()))
    undocumented = [
        node.name
        for node in declared
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not ast.get_docstring(node)
    ]
    assert undocumented == []


# What a stub could say wrongly about these: (as it is written, as it would be wrong).
WRONG = {
    "CommError": ("class CommError(DeepSpeedError)", "class CommError(OSError)"),
    "Config.load": ("def load(spec: str, strict: str | None = None", "def load(spec: str, strict: str"),
    "Engine.__new__": ("        ranks_per_host: int,\n        device", "        device"),
    "Engine.end_backward": ("def end_backward(self, scaled: bool, averaged", "def end_backward(self, averaged"),
    "Group.handle": ("def handle(self)", "def grip(self)"),
    "LoadedCheckpoint.face": ("def face(self) -> str", "def face(self, path: str) -> str"),
    "SCHEDULES": ("SCHEDULES: list[str]", ""),
    "Schedule": ("class Schedule:", "class Timetable:"),
    "StepReport": ("@final\nclass StepReport:", "class StepReport:"),
    "host_identity": ("def host_identity()", "def host_name()"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_difference_is_named(name: str) -> None:
    written, wrong = WRONG[name]
    stub = installed_stub()
    assert stub.count(written) == 1
    found = differences(in_stub(stub.replace(written, wrong)), in_module(_native))
    assert name in [difference.partition(":")[0] for difference in found]


def test_a_member_of_the_module_that_the_stub_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "new_function", len, raising=False)
    found = differences(in_stub(installed_stub()), in_module(_native))
    assert found == ["new_function: missing in the stub, (obj, /) in the module"]
