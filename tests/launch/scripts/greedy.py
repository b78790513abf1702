"""Rank 1 asks for more memory than it is allowed; the others wait."""

import os
import resource
import time

if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    held = bytearray(8 << 30)
time.sleep(600)
