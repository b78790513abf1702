"""Fixtures for every Python test: ranks forked from one server that has torch imported."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import run_outcomes, run_ranks

# A test run that was started in the background ignores Ctrl-C, and so would everything it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """`harness.run_ranks`: the values of a module-level function run on N ranks."""
    return run_ranks


@pytest.fixture
def outcomes() -> Callable[..., list[Any]]:
    """`harness.run_outcomes`: what became of each of N ranks, for tests where some are meant to fail."""
    return run_outcomes


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a ds_config.json and returns its path."""

    def write(config: dict[str, Any]) -> Path:
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(config))
        return path

    return write


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line on the launcher's tests, which need servers and runners that a machine may not have."""
    of_launcher = {
        status: [report for report in terminalreporter.stats.get(status, ()) if "tests/launch/" in report.nodeid]
        for status in ("passed", "failed", "error", "skipped")
    }
    skipped = len(of_launcher.pop("skipped"))
    if ran := sum(map(len, of_launcher.values())):
        terminalreporter.write_line(
            f"tests/launch, with real ssh servers, pdsh, Open MPI, MPICH and Slurm: {ran} ran, {skipped or 'none'} skipped"
        )
