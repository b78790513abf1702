"""The commands that the wheel puts on PATH: made by the build backend as for a wheel, around the command that is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from harness import Finished, run_command

DEEPSPEED = Path(os.environ.get("DEEPSPEED_COMMAND") or Path(sys.executable).parent / "deepspeed")
BACKEND = Path(__file__).parents[2] / "build_backend" / "deepspeed_build.py"

pytest.importorskip("maturin", reason="the build backend imports maturin")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's data folder."""
    spec = importlib.util.spec_from_file_location("deepspeed_build", BACKEND)
    assert spec is not None and spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    backend._build_command = lambda profile: DEEPSPEED
    folder = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(folder)
    try:
        backend._stage_command(None)
    finally:
        os.chdir(before)
    return folder / "target/wheel-data"


def run(data: Path, name: str, *arguments: str, cwd: Path | None = None) -> Finished:
    return run_command([str(data / "scripts" / name), *arguments], cwd=cwd)


def test_names_of_the_original(data: Path, tmp_path: Path) -> None:
    # Files of these names lie here; the commands are meant nevertheless.
    for word in ("report", "ssh", "bench"):
        (tmp_path / word).touch()
    for name in ("deepspeed", "ds", "deepspeed.pt"):
        done = run(data, name, "--version", cwd=tmp_path)
        assert done.code == 0 and done.stdout.startswith("deepspeed "), done
    for name in ("ds_report", "dsr"):
        done = run(data, name, "--hide_operator_status", cwd=tmp_path)
        assert done.code == 0 and "DeepSpeed general environment info:" in done.stdout, done
        assert "[YES]" not in done.stdout
    for name, usage in [("ds_ssh", "deepspeed ssh"), ("ds_bench", "deepspeed bench comm")]:
        done = run(data, name, "--help", cwd=tmp_path)
        assert done.code == 0 and f"Usage: {usage}" in done.stdout, done


def test_names_without_a_feature_say_so(data: Path) -> None:
    for name in ("ds_io", "ds_nvme_tune"):
        done = run(data, name, "--read")
        assert done.code == 2 and f"deepspeed: error: {name}, " in done.stderr, done
        assert done.stderr.endswith("is not built in this version\n")


def test_what_lies_beside_a_bin_folder(data: Path) -> None:
    share = data / "data/share"
    assert (share / "bash-completion/completions/deepspeed").read_text().startswith("_deepspeed")
    assert (share / "zsh/site-functions/_deepspeed").read_text().startswith("#compdef deepspeed ds")
    assert "complete -c deepspeed" in (share / "fish/vendor_completions.d/deepspeed.fish").read_text()
    assert (share / "man/man1/deepspeed-doctor.1").read_text().count(".SH") > 2
