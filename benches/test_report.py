"""The arithmetic of the benchmark reports: medians, ratios within rounds, budgets, and gaps told."""

import joined
import pytest
import report

RUN = {
    "command": "python benches/run.py",
    "time": "2026-01-01T00:00:00",
    "rounds": 2,
    "steps": 20,
    "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 8, "system": "Linux", "python": "3.11", "load": 0.5},
    "versions": {"ours": {"deepspeed": "0.20.0", "torch": "2.15.0"}},
    "missing": {},
    "failed": {"adam: original": "exit code 1: no compiler"},
    "results": {
        "step/fp32": {"bare": [{"round": 0, "step_ms": 100.0}, {"round": 1, "step_ms": 200.0}]},
        "step/fp32/stage1": {
            "ours": [
                {"round": 0, "step_ms": 110.0, "initialize_s": 0.2},
                {"round": 1, "step_ms": 220.0, "initialize_s": 0.4},
            ],
            "original": [
                {"round": 0, "step_ms": 150.0, "initialize_s": 8.0},
                {"round": 1, "step_ms": 280.0, "initialize_s": 6.0},
            ],
        },
    },
}


def test_ratios_are_taken_within_each_round() -> None:
    found = {(case, what): values for case, what, values in report.ratios(report.rows(RUN))}
    assert found["step/fp32/stage1", "above bare: ours / original"] == (0.225, 0.2, 0.25)


def test_budgets_judge_the_medians() -> None:
    found = {what: kept for what, _, _, kept in report.budgets(report.rows(RUN))}
    assert found == {"step/fp32/stage1: time above bare, of the original's": True, "initialize/step/fp32/stage1": True}


def test_stage_3_is_held_to_our_own_stage_2_within_each_round() -> None:
    def turns(*steps: float) -> list[dict]:
        return [{"round": turn, "step_ms": ms, "initialize_s": 0.1} for turn, ms in enumerate(steps)]

    results = {"large/bf16/stage2": {"ours": turns(100.0, 300.0)}, "large/bf16/stage3": {"ours": turns(120.0, 300.0)}}
    found = report.budgets(report.rows({**RUN, "results": results}))
    assert [line for line in found if "own stage 2" in line[0]] == [
        ("large/bf16: stage 3, of our own stage 2", "at most 1.1", "1.1", True)
    ]


def test_the_stream_is_held_to_a_plain_copy() -> None:
    stream = {"round": 0, "stream_ms": 1300.0, "one_by_one_ms": 1000.0, "side_by_side_ms": 900.0}
    found = report.budgets(report.rows({**RUN, "results": {"offload/stream": {"ours": [stream]}}}))
    assert found == [("offload/stream: of a plain direct copy's time", "at most 1.25", "1.3", False)]


def test_what_failed_is_told() -> None:
    assert "adam: original: exit code 1: no compiler" in report.text(RUN, report.rows(RUN))
    assert "adam: original: exit code 1: no compiler" in report.markdown(RUN, report.rows(RUN))


def test_joined_runs_keep_their_rounds_apart() -> None:
    whole = joined.join(RUN, [RUN])
    assert whole["rounds"] == 4
    assert [numbers["round"] for numbers in whole["results"]["step/fp32/stage1"]["ours"]] == [0, 1, 2, 3]
    found = {(case, what): values for case, what, values in report.ratios(report.rows(whole))}
    assert found["step/fp32/stage1", "above bare: ours / original"] == (0.225, 0.2, 0.25)
    assert report.markdown(whole, report.rows(whole)).count("2026-01-01 00:00:00: 2 of 20 timed steps") == 2
    # Nothing measured now: only what is added.
    assert joined.join({**RUN, "rounds": 0, "results": {}}, [RUN])["rounds"] == 2


def test_runs_of_other_machines_or_versions_are_not_joined() -> None:
    with pytest.raises(ValueError, match="cores was 64 in the run of 2026-01-01"):
        joined.join(RUN, [{**RUN, "machine": {**RUN["machine"], "cores": 64}}])
    with pytest.raises(ValueError, match=r"ours was .*0.19.*and is .*0.20.0"):
        joined.join(RUN, [{**RUN, "versions": {"ours": {"deepspeed": "0.19.0", "torch": "2.15.0"}}}])
