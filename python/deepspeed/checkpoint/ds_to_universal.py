"""`python -m deepspeed.checkpoint.ds_to_universal`: a checkpoint in the original's universal format.

Only the original needs one: our own checkpoints load at any number of ranks and any stage as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from deepspeed.launcher._native_command import become


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Takes the original's flags and hands over to `deepspeed checkpoint convert --to universal`."""
    parser = argparse.ArgumentParser(
        prog="ds_to_universal", description="Converts a checkpoint to the universal format."
    )
    parser.add_argument("--input_folder", required=True, help="the folder of one checkpoint")
    parser.add_argument(
        "--output_folder", required=True, help="the folder for the result; one that is there is replaced"
    )
    for name in ("--num_extract_workers", "--num_merge_workers"):
        parser.add_argument(name, type=int, help="accepted, has no effect: nothing is extracted and merged")
    for name in ("--keep_temp_folder", "--no_strict", "--inject_missing_state"):
        parser.add_argument(name, action="store_true", help="accepted, has no effect")
    given = parser.parse_args(arguments)
    become(["checkpoint", "convert", given.input_folder, given.output_folder, "--to", "universal", "--overwrite"])


if __name__ == "__main__":
    main()
