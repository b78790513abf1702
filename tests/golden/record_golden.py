"""Records what the original does in every case of golden_cases.py, as tests/golden/recorded/CASE.json.

    benches/peer-venv.sh FOLDER
    python tests/golden/record_golden.py --python FOLDER/bin/python [--only TEXT]

A case that the original cannot run is recorded with its error, so that the gap is visible.
"""

import argparse
import json
import os
import sys
import tempfile

import golden_ranks as ranks

RECORDED = os.path.join(ranks.HERE, "recorded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the interpreter that has the original")
    parser.add_argument("--only", help="record the cases whose names contain this")
    parser.add_argument("--deadline", type=float, default=1800, help="seconds")
    args = parser.parse_args()
    log = os.path.join(tempfile.mkdtemp(prefix="golden-"), "record.log")
    results, ended = ranks.run(args.python, args.only, args.deadline, log, backend="gloo")
    if ended:
        print(ranks.tail(log), file=sys.stderr)
        sys.exit(f"nothing recorded: {ended}; all output is in {log}")
    versions = results[0].pop("versions")
    os.makedirs(RECORDED, exist_ok=True)
    for name, first in results[0].items():
        second = results[1][name]
        if "error" in first:
            case = {"versions": versions, "error": first["error"]}
        else:
            case = {
                "versions": versions,
                "losses": [first["losses"], second["losses"]],
                "norms": first["norms"],
                "rates": first["rates"],
                "momentum": first["momentum"],
                "skipped": first["skipped"],
                "initial": first["initial"],
                "final": first["final"],
            }
        with open(os.path.join(RECORDED, f"{name}.json"), "w", encoding="utf-8") as file:
            json.dump(case, file, separators=(",", ":"))
            file.write("\n")
        outcome = case.get("error") or f"recorded, last loss {case['losses'][0][-1]:.5f}"
        print(f"{name}: {outcome}")


if __name__ == "__main__":
    main()
