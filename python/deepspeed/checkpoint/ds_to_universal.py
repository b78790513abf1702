"""A checkpoint of any format as one of the original's universal format, which it loads at any number of ranks.

python -m deepspeed.checkpoint.ds_to_universal --input_folder DIR/TAG --output_folder OUT

Needed only on the way back to the original: this package loads every checkpoint at any number of ranks as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepspeed import _native
from deepspeed.launcher._native_command import become


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the original's program; those that say how it works have no effect."""
    parser = argparse.ArgumentParser(
        prog="ds_to_universal", description="Writes a checkpoint in the original DeepSpeed's universal format."
    )
    parser.add_argument("--input_folder", required=True, help="the folder of one checkpoint: DIR/TAG")
    parser.add_argument("--output_folder", required=True, help="the folder for the result; a universal one is replaced")
    parser.add_argument("--num_extract_workers", type=int, default=4, help="accepted, has no effect")
    parser.add_argument("--num_merge_workers", type=int, default=2, help="accepted, has no effect")
    parser.add_argument("--keep_temp_folder", action="store_true", help="accepted, has no effect: there is none")
    parser.add_argument("--no_strict", dest="strict", action="store_false", help="accepted, has no effect")
    parser.add_argument("--inject_missing_state", action="store_true", help="accepted, has no effect: none is missing")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace | Sequence[str] | None = None) -> None:
    """Converts `args.input_folder` to `args.output_folder`. Without `args`, those of the command line."""
    given = args if args is not None and not isinstance(args, Sequence) else parse_arguments(args)
    _native.write_universal(given.input_folder, given.output_folder, overwrite=True)


if __name__ == "__main__":
    _given = parse_arguments()
    become(["checkpoint", "convert", _given.input_folder, _given.output_folder, "--to", "universal", "--overwrite"])
