"""Records what the original does in every case of library_cases.py, as tests/ecosystem/recorded.json.

    benches/peer-venv.sh FOLDER; FOLDER/bin/pip install transformers==5.23 accelerate==1.15 peft==0.21.2
    FOLDER/bin/python tests/ecosystem/record_libraries.py [--only TEXT]

A case that the original cannot run is recorded with its error, so that the gap is visible.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from library_cases import CASES  # noqa: E402
from library_play import RECORDING, play  # noqa: E402

RECORDED = HERE / "recorded.json"
LIBRARIES = ("deepspeed", "torch", "transformers", "accelerate", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="record the cases whose names contain this")
    parser.add_argument("--deadline", type=float, default=300, help="seconds for each case")
    args = parser.parse_args()
    # The original builds its operators with the ninja of its own environment.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"cases": {}}
    recorded["versions"] = {name: version(name) for name in LIBRARIES}
    for name in CASES:
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="ecosystem-") as folder:
            try:
                found = play(name, Path(folder), deadline=args.deadline, env={RECORDING: "1"})
            except AssertionError as error:
                last = [line for line in str(error).splitlines() if line.strip() and not line.startswith(" ")]
                found = {"error": next((line for line in last if "Error" in line), last[-1])}
                print(str(error)[-2000:], file=sys.stderr)
        recorded["cases"][name] = found
        print(name, found.get("error") or found["losses"][-1])
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
