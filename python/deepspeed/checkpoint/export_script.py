"""`zero_to_fp32.py` and `zero_to_torch.py`, the scripts beside checkpoints.

They hand over to `deepspeed checkpoint export`, so nothing here imports torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from deepspeed.launcher._native_command import become

_SCRIPT = '''#!/usr/bin/env python
"""Writes the checkpoint in this folder as one model: {name} CHECKPOINTS OUT; --help tells more."""

from deepspeed.checkpoint.export_script import main

if __name__ == "__main__":
    main(dtype={dtype!r})
'''
_SCRIPTS = {
    name: _SCRIPT.format(name=name, dtype=dtype)
    for name, dtype in (("zero_to_fp32.py", "fp32"), ("zero_to_torch.py", None))
}


def place_scripts(folder: str | os.PathLike[str]) -> None:
    """Puts `zero_to_fp32.py` and `zero_to_torch.py` beside checkpoints, where people look for them."""
    for name, text in _SCRIPTS.items():
        path = Path(folder) / name
        if path.is_file() and path.read_text() == text:
            continue
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.chmod(0o755)
        temporary.replace(path)


def main(arguments: Sequence[str] | None = None, dtype: str | None = "fp32") -> NoReturn:
    """`zero_to_fp32.py` and, with `dtype` None, `zero_to_torch.py`: hands over to `deepspeed checkpoint export`."""
    parser = argparse.ArgumentParser(
        description="Writes a checkpoint as one model, as `deepspeed checkpoint export` does.",
        prog=os.path.basename(sys.argv[0]),
    )
    parser.add_argument("checkpoint_dir", help="the folder of checkpoints, or that of one checkpoint")
    parser.add_argument("output_dir", help="the folder for the model; weights that are in it are replaced")
    parser.add_argument("--max_shard_size", default="5GB", help="no file is larger, as 5GB")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors in place of torch files")
    parser.add_argument("-t", "--tag", help="the checkpoint; by default the one that `latest` names")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what was not trained")
    parser.add_argument("-d", "--debug", action="store_true", help="accepted, has no effect")
    if dtype is None:
        parser.add_argument("--dtype", required=True, choices=("fp32", "fp16", "bf16"), help="the dtype of the weights")
    given = parser.parse_args(arguments)
    command = ["checkpoint", "export", given.checkpoint_dir, given.output_dir, "--overwrite"]
    command += ["--dtype", dtype or given.dtype, "--max-shard-size", given.max_shard_size]
    command += ["--format", "safetensors" if given.safe_serialization else "torch"]
    command += ["--tag", given.tag] if given.tag else []
    command += ["--exclude-frozen"] if given.exclude_frozen_parameters else []
    become(command)
