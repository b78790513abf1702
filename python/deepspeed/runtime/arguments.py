"""Command line arguments of a training script that uses DeepSpeed."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--deepspeed` (flag) and `--deepspeed_config FILE` to `parser` and returns it.

    `--deepscale` and `--deepscale_config` are their deprecated names. `--local_rank` is the script's own to add.
    """
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configuration")
    group.add_argument(
        "--deepspeed",
        default=False,
        action="store_true",
        help="run through DeepSpeed (a flag for the script's own use)",
    )
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the DeepSpeed JSON configuration")
    group.add_argument("--deepscale", default=False, action="store_true", help="deprecated name of --deepspeed")
    group.add_argument("--deepscale_config", default=None, type=str, help="deprecated name of --deepspeed_config")
    return parser
