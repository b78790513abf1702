"""Prints the share of Python among the source lines (tests, benches and examples aside) and fails above a quarter."""

import subprocess
import sys

LIMIT = 0.25


def lines(pattern: str) -> int:
    names = subprocess.run(["git", "ls-files", pattern], capture_output=True, text=True, check=True).stdout.split()
    total = 0
    for name in names:
        if not any(part in ("tests", "test", "benches", "examples", "fuzz", "tools") for part in name.split("/")):
            with open(name, encoding="utf-8") as file:
                total += sum(1 for _ in file)
    return total


rust = lines("*.rs")
python = lines("*.py") + lines("*.pyi")
share = python / max(rust + python, 1)
print(f"source lines: {rust} Rust, {python} Python ({share:.1%}; limit {LIMIT:.0%})")
sys.exit(share > LIMIT)
