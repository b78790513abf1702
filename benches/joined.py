"""Runs of other hours joined to one: their rounds are appended, so that ratios stay within a round of one run."""

from __future__ import annotations


def join(run: dict, earlier: list[dict]) -> dict:
    """`run` with what `earlier` runs measured on the same machine with the same versions; ValueError where they differ.

    `parts` of the result says what each run was. A peer that any of them found is not missing.
    """
    parts = [*earlier, run] if run["rounds"] else list(earlier)
    for other in parts:
        for what in ("cpu", "cores", "system"):
            if other["machine"][what] != run["machine"][what]:
                raise ValueError(
                    f"{what} was {other['machine'][what]!r} in the run of {other['time']}, and is {run['machine'][what]!r} now"
                )
        for peer, version in other["versions"].items():
            if run["versions"].get(peer, version) != version:
                raise ValueError(
                    f"{peer} was {version} in the run of {other['time']}, and is {run['versions'][peer]} now"
                )
    results: dict[str, dict[str, list[dict]]] = {}
    turns = 0
    for part in parts:
        for case, peers in part["results"].items():
            for peer, rounds in peers.items():
                moved = [{**numbers, "round": numbers["round"] + turns} for numbers in rounds]
                results.setdefault(case, {}).setdefault(peer, []).extend(moved)
        turns += part["rounds"]
    versions = {peer: version for part in parts for peer, version in part["versions"].items()}
    return {
        **run,
        "parts": [{key: part[key] for key in ("time", "command", "rounds", "steps")} for part in parts],
        "rounds": turns,
        "versions": versions,
        "missing": {peer: why for part in parts for peer, why in part["missing"].items() if peer not in versions},
        "failed": {what: why for part in parts for what, why in part["failed"].items()},
        "results": {case: results[case] for case in sorted(results)},
    }
