"""`python -m deepspeed.env_report` is `deepspeed report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from deepspeed.launcher._native_command import become


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Becomes the native report; `args` are those of the process when not given.

    --hide_operator_status, --hide_errors_and_warnings  leave parts out; --torch imports torch; --json.
    """
    become(["__run", "report", *(sys.argv[1:] if args is None else args)])


cli_main = main

if __name__ == "__main__":
    main()
