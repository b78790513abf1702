"""The engine on torch's operations: forced onto CPU tensors, it trains as the CPU engine does, the same at every stage."""

from __future__ import annotations

from typing import Any

import pytest

from harness import run_ranks
from toy import config, run, start
from variants import digest

PRECISIONS = ("fp32", "bf16", "fp16")
# Relative differences to the CPU engine: sums and updates in other orders, amplified by the updates.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
FORCED = {"DS_TORCH_DEVICE": "1"}
STEPS = 6


def stages(backend: str | None, wanted: tuple[int, ...], **more: Any) -> dict[str, Any]:
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    out: dict[str, Any] = {}
    for precision in PRECISIONS:
        for stage in wanted:
            engine = start(config(stage, precision, gradient_clipping=0.7, **more))
            found = run(engine, STEPS)
            found |= {"weights": digest(engine.module), "summary": engine._native.summary()}
            out[f"{precision} {stage}"] = found
            engine.destroy()
    return out


def assert_close(found: dict[str, Any], expected: dict[str, Any], precision: str) -> None:
    tolerance = TOLERANCES[precision]
    assert found["skipped"] == expected["skipped"]
    for what in ("losses", "norms"):
        for step, (a, b) in enumerate(zip(found[what], expected[what], strict=True)):
            assert abs(a - b) <= tolerance * max(abs(b), 0.1), f"{what}, step {step}: {a} and {b}"


@pytest.mark.parametrize(("world", "backend"), [(1, None), (2, None), (2, "gloo")])
def test_stages_are_bit_identical_and_agree_with_the_cpu(world: int, backend: str | None) -> None:
    wanted = (0, 1, 2, 3)
    found = run_ranks(stages, world, backend, wanted, env=FORCED, deadline=180)
    expected = run_ranks(stages, world, None, (0,), deadline=120)
    for rank in range(world):
        for precision in PRECISIONS:
            reference = found[rank][f"{precision} 0"]
            assert "by torch" in reference["summary"]
            assert len(reference["norms"]) == STEPS
            assert_close(reference, expected[rank][f"{precision} 0"], precision)
            for stage in wanted:
                other = found[rank][f"{precision} {stage}"]
                for what in ("losses", "norms", "weights"):
                    assert other[what] == reference[what], f"{precision} stage {stage}: {what}"
                assert other["weights"] == found[0][f"{precision} 0"]["weights"]
