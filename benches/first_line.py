"""The user's script of the start-up benchmark: writes when its first line ran to the folder given as first argument."""

import time

reached = time.time()

import os  # noqa: E402
import sys  # noqa: E402

with open(os.path.join(sys.argv[1], os.environ.get("RANK", "0")), "w", encoding="ascii") as file:
    file.write(repr(reached))
