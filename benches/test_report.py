"""The arithmetic of the benchmark reports: medians, ratios within rounds, budgets, and gaps told."""

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


def test_what_failed_is_told() -> None:
    assert "adam: original: exit code 1: no compiler" in report.text(RUN, report.rows(RUN))
    assert "adam: original: exit code 1: no compiler" in report.markdown(RUN, report.rows(RUN))
