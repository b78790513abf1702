"""`python -m deepspeed.launcher.launch --world_info=BASE64 ...`: the ranks of one host, by the native command."""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from deepspeed.launcher._native_command import become


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Becomes `deepspeed` for the slots that `--world_info` gives this host.

    On one host that is `deepspeed --include localhost:SLOTS ...`; as one of several, `deepspeed --no_ssh --node_rank N ...`.

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
    node_rank = given.pop("node_rank")
    if len(hosts) == 1:
        (slots,) = hosts.values()
        flags = [f"--include=localhost:{','.join(map(str, slots))}"]
    else:
        lines = [f"{host} slots={max(slots) + 1}\n" for host, slots in hosts.items()]
        include = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in hosts.items())
        # A file without a name, which the command inherits open.
        hostfile = os.memfd_create("hostfile", 0)
        os.write(hostfile, "".join(lines).encode())
        flags = [f"--hostfile=/dev/fd/{hostfile}", f"--include={include}", "--no_ssh", f"--node_rank={node_rank}"]
    for name, value in given.items():
        if value is not None:
            flags.append(name if value is True else f"--{name}={value}")
    become([*flags, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
