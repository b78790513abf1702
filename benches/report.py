"""Turns the numbers of a benchmark run into tables: medians, spread, ratios within each round, and the budgets."""

Row = tuple[str, str, str, list[tuple[int, float]]]

FOOTNOTES = {
    "startup": "from starting the launcher to the first line of the user's script in the last of 2 ranks; "
    "`python alone` is one Python without a launcher",
    "import": "`import deepspeed` after `import torch`, one process",
    "initialize": "`deepspeed.initialize` of the model of the step benchmark",
    "step": "forward, backward and update, the median of a run; `bare` is forward and backward alone; 2 ranks, 1 thread each",
    "large": "as `step`, with 99.7 M parameters and one sample of 64 bytes a rank: the engine is what is measured",
    "offload": "as `large`, with the optimizer's state in host memory (cpu) or in a file (nvme), at stages 2 and 3; `stream` reads and writes "
    "back 1 GB of optimizer state without computing, beside a plain direct copy of as many bytes of the same disk",
    "adam": "one update of 50 M fp32 parameters, one thread; `copy` and `in place` (overwriting what was read) move the same "
    "28 bytes a parameter",
    "allreduce": "32 MiB of fp32 between 2 ranks of one host; `engine` is the collective that our training step uses, the "
    "others are functions of `deepspeed.comm`",
    "checkpoint": "99.7 M parameters in bf16 with AdamW at stage 2, 2 ranks: how long training stands still for a save, how long "
    "until the checkpoint is complete and synced, and how long a load takes; `behind` is `checkpoint.async`; `copy` copies the "
    "same files to the same disk and syncs them, `read` reads them, with one thread a rank; files are in the page cache; "
    "`export memory` is the most that `deepspeed checkpoint export` had while it wrote files of one shard's size",
}


def rows(run: dict) -> list[Row]:
    """(case, peer, unit, [(round, value)]): what each peer took."""
    out: list[Row] = []

    def add(case, peer, unit, turns, metric):
        values = [(turn["round"], turn[metric]) for turn in turns if turn.get(metric) is not None]
        if values:
            out.append((case, peer, unit, values))

    for case, peers in run["results"].items():
        group = case.split("/")[0]
        for peer, turns in peers.items():
            if group == "startup":
                add("startup", peer, "s", turns, "first_line_s")
            elif group == "import":
                add("import", peer, "s", turns, "import_s")
            elif case == "offload/stream":
                add(case, "ours", "ms", turns, "stream_ms")
                add(case, "direct copy", "ms", turns, "one_by_one_ms")
                add(case, "direct copy by two threads", "ms", turns, "side_by_side_ms")
            elif group in ("step", "large", "offload"):
                if peer in ("bare", "ddp"):
                    # The same for every stage, and shown beside each.
                    prefix = case.removesuffix("/bare") + "/"
                    shared = [c for c in run["results"] if c.startswith(prefix) and c not in (case, "offload/stream")]
                    for other in shared or [case]:
                        add(other, peer, "ms", turns, "step_ms")
                else:
                    add(case, peer, "ms", turns, "step_ms")
                    add(f"initialize/{case}", peer, "s", turns, "initialize_s")
            elif group == "adam":
                add("adam", peer, "ms", turns, "cpu_adam_ms")
                if peer == "ours" or "ours" not in peers:
                    add("adam", "torch fused", "ms", turns, "torch_fused_ms")
                    add("adam", "copy", "ms", turns, "copy_ms")
                    add("adam", "in place", "ms", turns, "in_place_ms")
            elif group == "checkpoint":
                add("checkpoint/stands still", peer, "s", turns, "stands_still_s")
                add("checkpoint/save", peer, "s", turns, "save_s")
                if peer != "ours behind":
                    add("checkpoint/load", peer, "s", turns, "load_s")
                if peer == "ours" or "ours" not in peers:
                    add("checkpoint/save", "copy", "s", turns, "copy_s")
                    add("checkpoint/load", "copy", "s", turns, "copy_s")
                    add("checkpoint/load", "read", "s", turns, "read_s")
                if peer == "ours":
                    add("checkpoint/export memory", peer, "MiB", turns, "export_peak_mib")
                    add("checkpoint/export memory", "one shard", "MiB", turns, "export_shard_mib")
            elif group == "allreduce":
                add("allreduce", f"{peer} engine", "ms", turns, "engine_ms")
                add("allreduce", f"{peer} all_reduce", "ms", turns, "all_reduce_ms")
                add("allreduce", f"{peer} inference_all_reduce", "ms", turns, "inference_all_reduce_ms")
                if peer == "original" or "original" not in peers:
                    add("allreduce", "gloo", "ms", turns, "gloo_ms")
    order = list(FOOTNOTES)
    return sorted(out, key=lambda row: (order.index(row[0].split("/")[0]), row[0]))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lowest, highest."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return median, ordered[0], ordered[-1]


def bars(table: list[Row]) -> list[tuple[str, str, list[tuple[str, float, float, float]]]]:
    cases: dict[str, list] = {}
    units = {}
    for case, peer, unit, values in table:
        cases.setdefault(case, []).append((peer, *spread([v for _, v in values])))
        units[case] = unit
    return [
        (case, units[case], peers)
        for case, peers in cases.items()
        if not case.startswith(("initialize/large", "initialize/offload"))
    ]


def ratios(table: list[Row]) -> list[tuple[str, str, tuple[float, float, float]]]:
    """Ours divided by each other peer, in the rounds that have both; for steps also the time above bare."""
    cases: dict[str, dict[str, dict[int, float]]] = {}
    for case, peer, _, values in table:
        cases.setdefault(case, {})[peer] = dict(values)
    out = []
    for case, peers in cases.items():
        mine = [peer for peer in peers if peer.split()[0] == "ours"]
        # Of several ways of ours, the engine's own is the one that training takes.
        for ours in [peer for peer in mine if peer.endswith("engine")] or mine:
            for peer, theirs in peers.items():
                shared = [turn for turn in peers[ours] if turn in theirs]
                if peer in mine or not shared:
                    continue
                values = [peers[ours][turn] / theirs[turn] for turn in shared]
                out.append((case, f"{ours} / {peer}", spread(values)))
                bare = peers.get("bare")
                if bare is None or peer == "bare":
                    continue
                above = [
                    (peers[ours][t] - bare[t]) / (theirs[t] - bare[t])
                    for t in shared
                    if t in bare and theirs[t] > bare[t]
                ]
                if above:
                    out.append((case, f"above bare: {ours} / {peer}", spread(above)))
    return out


def budgets(table: list[Row]) -> list[tuple[str, str, str, bool]]:
    """(what, budget, measured, kept) for the budgets of the design that this run measured."""
    medians = {(case, peer): spread([v for _, v in values])[0] for case, peer, _, values in table}
    out = []

    def check(what, limit, value, unit):
        if value is not None:
            out.append((what, f"at most {limit:.3g}{unit}", f"{value:.3g}{unit}", value <= limit))

    def get(case, peer):
        return medians.get((case, peer))

    if get("startup", "ours") is not None and get("startup", "python alone") is not None:
        check(
            "launch to first line, above Python's start",
            0.2,
            get("startup", "ours") - get("startup", "python alone"),
            " s",
        )
    check("import above torch", 0.15, get("import", "ours"), " s")
    found = {}
    for case, what, values in ratios(table):
        found[case, what] = values[0]
    for case in sorted({case for case, _, _, _ in table}):
        if case.startswith("initialize/step"):
            check(case, 0.5, get(case, "ours"), " s")
        if case.startswith(("step/", "large/", "offload/")):
            check(
                f"{case}: time above bare, of the original's",
                1 / 3,
                found.get((case, "above bare: ours / original")),
                "",
            )
            check(f"{case}: step, of DDP's with fused AdamW", 1.0, found.get((case, "ours / ddp")), "")
    ours = {case: dict(values) for case, peer, _, values in table if peer == "ours"}
    for case in sorted(ours):
        prefix = case.removesuffix("/stage3")
        if prefix == case or not case.startswith(("step/", "large/")):
            continue
        two = ours.get(f"{prefix}/stage2", {})
        shared = [value / two[turn] for turn, value in ours[case].items() if turn in two]
        check(f"{prefix}: stage 3, of our own stage 2", 1.1, spread(shared)[0] if shared else None, "")
    # 80% of the speed of a copy.
    check(
        "offload/stream: of a plain direct copy's time", 1.25, found.get(("offload/stream", "ours / direct copy")), ""
    )
    check("adam: of the memory's limit, in place", 1.1, found.get(("adam", "ours / in place")), "")
    still, theirs = get("checkpoint/stands still", "ours behind"), get("checkpoint/save", "original")
    if still is not None and theirs is not None:
        check("checkpoint: training stands still, of the original's save", 0.1, still / theirs, "")
    for what in ("save", "load"):
        # 80% of the speed of a copy.
        check(f"checkpoint: {what}, of a copy's time", 1.25, found.get((f"checkpoint/{what}", "ours / copy")), "")
    exported = found.get(("checkpoint/export memory", "ours / one shard"))
    check("checkpoint: peak memory of an export, of one shard's size", 1.1, exported, "")
    gloo = [v for (case, what), v in found.items() if case == "allreduce" and what.endswith("/ gloo")]
    check("all-reduce: of Gloo's time", 1 / 8, min(gloo) if gloo else None, "")
    return out


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def grid(header: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    form = lambda line: "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([form(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(form, lines)])


def tables(table: list[Row]) -> tuple[str, str, str]:
    measured = []
    for case, peer, unit, values in table:
        median, low, high = spread([v for _, v in values])
        measured.append([case, peer, f"{number(median)} {unit}", f"{number(low)} - {number(high)}"])
    compared = [
        [case, what, number(m), f"{number(low)} - {number(high)}"] for case, what, (m, low, high) in ratios(table)
    ]
    kept = [[what, limit, value, "yes" if good else "NO"] for what, limit, value, good in budgets(table)]
    return (
        grid(["case", "peer", "median", "spread"], measured),
        grid(["case", "ratio", "median", "spread"], compared) if compared else "",
        grid(["budget", "limit", "measured", "kept"], kept) if kept else "",
    )


def problems(run: dict) -> list[str]:
    out = [f"skipped: {peer}: {reason}" for peer, reason in run["missing"].items()]
    return out + [f"failed: {what}: {reason}" for what, reason in run["failed"].items()]


def text(run: dict, table: list[Row]) -> str:
    return "\n\n".join(part for part in [*tables(table), "\n".join(problems(run))] if part)


def markdown(run: dict, table: list[Row]) -> str:
    machine, measured = run["machine"], tables(table)
    versions = ", ".join(
        f"{peer}: deepspeed {v['deepspeed']} with torch {v['torch']}" for peer, v in run["versions"].items()
    )
    notes = "\n".join(
        f"- **{name}**: {note}."
        for name, note in FOOTNOTES.items()
        if any(row[0].split("/")[0] == name for row in table)
    )
    trouble = "\n".join(f"- {line}" for line in problems(run)) or "None."
    parts = run.get("parts", [run])
    ran = "; ".join(
        f"`{part['command']}` at {part['time'].replace('T', ' ')}: {part['rounds']} of {part['steps']} timed steps"
        for part in parts
    )
    return f"""# Benchmarks

Written by `{run["command"]}` on {run["time"][:10]}; do not edit by hand. `make bench` measures again on your machine.

| | |
|---|---|
| processor | {machine["cpu"]}, {machine["cores"]} cores |
| memory | {machine["memory_gib"]} GiB |
| system | {machine["system"]}, Python {machine["python"]} |
| load when it ended | {machine["load"]:.2f} |
| versions | {versions} |
| rounds | {ran}; every round runs every peer once, in rotating order |

![medians and spread](benchmarks.svg)

## What is measured

{notes}

## Budgets

{measured[2] or "None of the budgets could be judged by this run."}

## Ratios

Taken within each round, so below 1 means that ours is faster whatever else the machine did. «Above bare» compares what
is left of a step after forward and backward: what the engine itself costs.

{measured[1] or "Only one peer was there."}

## Times

{measured[0]}

## Skipped or failed

{trouble}
"""
