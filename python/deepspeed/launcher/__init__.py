"""The launcher is the native `deepspeed` command; these modules keep `python -m deepspeed.launcher...` working."""
