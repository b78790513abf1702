"""PEP 517 backend: maturin, and before it the native `deepspeed` command as the wheel's script.

maturin builds one crate, the extension module. This builds the command with cargo and leaves it in
`target/wheel-data/scripts`, which pyproject.toml names as the wheel's data folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import maturin
from maturin import get_requires_for_build_editable, get_requires_for_build_sdist, get_requires_for_build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_DATA = Path("target/wheel-data")
_SCRIPTS = _DATA / "scripts"
# Other commands of the original, and what they are here.
_ALIASES = {
    "ds": "",
    "deepspeed.pt": "",
    "ds_report": "__run report ",
    "dsr": "__run report ",
    "ds_ssh": "__run ssh ",
    "ds_bench": "__run bench comm ",
}
_ALIAS = '#!/bin/sh\nexec "$(dirname "$(readlink -f "$0")")/deepspeed" {words}"$@"\n'
# Those whose feature is not built.
_NOT_BUILT = {"ds_io": "the benchmark of NVMe I/O", "ds_nvme_tune": "the search for the best NVMe settings"}
_REFUSAL = '#!/bin/sh\necho "deepspeed: error: {name}, {feature}, is not built in this version" >&2\nexit 2\n'
# What the command says about itself, where shells and man look beside a `bin` folder.
_SHARE = _DATA / "data/share"
_COMPLETIONS = {
    "bash": "bash-completion/completions/deepspeed",
    "zsh": "zsh/site-functions/_deepspeed",
    "fish": "fish/vendor_completions.d/deepspeed.fish",
}


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    _SCRIPTS.mkdir(parents=True, exist_ok=True)  # maturin wants the data folder to exist
    return maturin.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_sdist(sdist_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    _SCRIPTS.mkdir(parents=True, exist_ok=True)
    return maturin.build_sdist(sdist_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _stage_command(config_settings)
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    _stage_command(config_settings)
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


def _stage_command(config_settings: Mapping[str, Any] | None) -> None:
    executable = _build_command(_profile(config_settings))
    shutil.rmtree(_DATA, ignore_errors=True)
    _SCRIPTS.mkdir(parents=True)
    shutil.copy2(executable, _SCRIPTS / "deepspeed")
    for name, words in _ALIASES.items():
        _write_script(name, _ALIAS.format(words=words))
    for name, feature in _NOT_BUILT.items():
        _write_script(name, _REFUSAL.format(name=name, feature=feature))
    subprocess.run([executable, "__run", "man", "--dir", _SHARE / "man/man1"], check=True, stdout=subprocess.DEVNULL)
    for shell, path in _COMPLETIONS.items():
        (_SHARE / path).parent.mkdir(parents=True)
        with open(_SHARE / path, "wb") as file:
            subprocess.run([executable, "__run", "completions", shell], check=True, stdout=file)


def _write_script(name: str, text: str) -> None:
    script = _SCRIPTS / name
    script.write_text(text)
    script.chmod(0o755)


def _build_command(profile: str) -> Path:
    """Builds the command and returns where cargo put it."""
    build = ["cargo", "build", "--profile", profile, "--package", "deepspeed-cli", "--bin", "deepspeed"]
    result = subprocess.run(
        [*build, "--message-format=json-render-diagnostics"], stdout=subprocess.PIPE, check=True, text=True
    )
    for line in result.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable"):
            return Path(message["executable"])
    raise RuntimeError(f"`{' '.join(build)}` built no executable")


def _profile(config_settings: Mapping[str, Any] | None) -> str:
    """The profile that maturin is told to use, so that both halves of the wheel have one."""
    arguments = maturin.get_maturin_pep517_args(config_settings)
    for index, argument in enumerate(arguments):
        if argument == "--profile":
            return arguments[index + 1]
        if argument.startswith("--profile="):
            return argument.partition("=")[2]
    return "release"
