"""docs/checkpoint-format.md: its example, as it is printed there, reads a checkpoint with nothing of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saved import saved

DOCUMENT = Path(__file__).parents[3] / "docs/checkpoint-format.md"


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 1, "the document has one example"
    return blocks[0]


@pytest.mark.parametrize(("world", "stage", "precision"), [(1, 0, "fp32"), (3, 2, "bf16"), (2, 3, "fp16")])
def test_the_example_reads_the_masters(tmp_path: Path, world: int, stage: int, precision: str) -> None:
    saves, masters = saved(world, stage, precision)
    result = tmp_path / "weights.npz"
    program = (
        f"{example()}\nimport sys\n"
        f"weights = fp32_weights({str(saves)!r})\n"
        f"numpy.savez({str(result)!r}, **weights)\n"
        "assert weights['head.weight'] is weights['token.weight']\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules\n"
    )
    # -I: nothing of ours is in reach by accident.
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    import numpy

    weights = numpy.load(result)
    trained = {name: master for name, master in masters.items() if name != "frozen_scale"}
    assert set(weights) == {*trained, "head.weight"}
    for name, master in trained.items():
        assert torch.equal(torch.from_numpy(weights[name]).view(torch.int32), master.view(torch.int32)), name


def test_every_field_of_a_manifest_is_in_the_document() -> None:
    import json

    saves, _ = saved()
    text = DOCUMENT.read_text()
    manifest = json.loads((saves / "global_step2/manifest.json").read_text())
    fields = {*manifest, *manifest["params"][0]}
    for file in manifest["files"]:
        fields |= {*file, *(key for part in ("slices", "tensors", "blobs") for it in file.get(part, []) for key in it)}
    assert [field for field in sorted(fields) if f"`{field}`" not in text and f"`{field}[]`" not in text] == []
