"""`python -m deepspeed ARGS` is `deepspeed ARGS`."""

from __future__ import annotations

from deepspeed.launcher.runner import main

if __name__ == "__main__":
    main()
