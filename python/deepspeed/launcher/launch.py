"""`python -m deepspeed.launcher.launch --world_info=BASE64 ...`: the ranks of one host, by the native command."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from deepspeed._features import not_built
from deepspeed.launcher._native_command import become


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Becomes `deepspeed --include localhost:SLOTS ...` with the slots that `--world_info` gives this host.

    --world_info  base64 of JSON {host: [slots]}; all other flags are those of `deepspeed`.
    """
    parser = argparse.ArgumentParser(prog="deepspeed.launcher.launch", allow_abbrev=False)
    parser.add_argument("--world_info", required=True, help="base64 of JSON {host: [slots]}")
    parser.add_argument("--node_rank", type=int, default=0, help="this host's place among them")
    parser.add_argument("--master_addr")
    parser.add_argument("--master_port")
    parser.add_argument("--enable_each_rank_log")
    parser.add_argument("--bind_core_list")
    parser.add_argument("--log_level")
    for flag in ("--module", "--no_python", "--no_local_rank", "--bind_cores_to_rank", "--save_pid", "-q", "--quiet"):
        parser.add_argument(flag, action="store_true", default=None, dest=flag)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    given = vars(parser.parse_args(args))
    hosts = json.loads(base64.urlsafe_b64decode(given.pop("world_info")))
    command = given.pop("command")
    if len(hosts) != 1 or given.pop("node_rank") != 0:
        not_built("deepspeed.launcher.launch with several hosts", "launching on several hosts")
    (slots,) = hosts.values()
    flags = [f"--include=localhost:{','.join(map(str, slots))}"]
    for name, value in given.items():
        if value is not None:
            flags.append(name if value is True else f"--{name}={value}")
    become([*flags, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
