"""The example trains, saves, resumes with the same batches, and ends with the two lines that others read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "gpt"
DEADLINE = 240
SMALL = [
    "--layers",
    "1",
    "--width",
    "64",
    "--heads",
    "1",
    "--length",
    "32",
    "--report_interval",
    "4",
    "--validate_interval",
    "1000",
    "--save_interval",
    "8",
    "--sample_bytes",
    "20",
]


def train(out: Path, *more: str) -> str:
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        str(launcher),
        "--num_gpus",
        "2",
        str(EXAMPLE / "train.py"),
        "--deepspeed",
        "--deepspeed_config",
        str(EXAMPLE / "ds_config.json"),
        "--out",
        str(out),
        *SMALL,
        *more,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_trains_and_resumes(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "--steps", "16")
    validation, throughput = whole.rstrip().splitlines()[-2:]
    assert re.fullmatch(r"validation loss: \d+\.\d+ nats/byte", validation), whole
    assert re.fullmatch(r"throughput: \d+\.\d+ samples/s", throughput), whole
    for name in ("loss.svg", "log.json", "sample.txt"):
        assert (tmp_path / "whole" / name).stat().st_size > 0

    train(tmp_path / "halves", "--steps", "8")
    resumed = train(tmp_path / "halves", "--steps", "16", "--resume")
    assert "after step 8" in resumed
    first, second = (json.loads((tmp_path / name / "log.json").read_text()) for name in ("whole", "halves"))
    assert first["train"] == second["train"]
    assert first["validation_loss"] == second["validation_loss"]
    assert first["train"][-1][1] < first["train"][0][1]
