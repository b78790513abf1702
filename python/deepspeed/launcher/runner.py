"""`python -m deepspeed.launcher.runner ARGS` is `deepspeed ARGS`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from deepspeed.launcher._native_command import become

# The file of K=V lines that the launcher hands on to every host; accelerate appends to it.
DEEPSPEED_ENVIRONMENT_NAME: str = os.getenv("DS_ENV_FILE", ".deepspeed_env")
DLTS_HOSTFILE: str = "/job/hostfile"


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Becomes the native launcher; `args` are those of the process when not given."""
    become(sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
