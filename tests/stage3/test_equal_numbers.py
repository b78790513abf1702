"""Losses, gradient norms and weights do not depend on how the model state is kept: DESIGN section 8, bit for bit."""

from __future__ import annotations

import math
import traceback
from typing import Any

import pytest
import torch

from harness import run_ranks
from models import CASES
from variants import PRECISIONS, SGD, STAGE_3, VARIANTS, apart, build, config, micro_step, start, train, values

REFERENCE, *OTHERS = VARIANTS
SHARDED = STAGE_3[0]
FULL_WORLD = 2
WORLDS = (1, 2, 3, 4)


def plan(case: str, world: int) -> dict[str, tuple[str, ...]]:
    """Variants by precision: on two ranks everything; elsewhere one precision, stage 3 and two of the others, so that
    each model meets each of them on some world."""
    if world == FULL_WORLD:
        return dict.fromkeys(PRECISIONS, VARIANTS)
    turn = list(CASES).index(case) + WORLDS.index(world)
    others = [variant for variant in OTHERS if variant != SHARDED]
    chosen = dict.fromkeys((REFERENCE, SHARDED, others[turn % len(others)], others[(turn + 3) % len(others)]))
    return {PRECISIONS[turn % 3]: tuple(chosen)}


def all_variants(case: str, chosen: dict[str, tuple[str, ...]], folder: str) -> dict[str, Any]:
    out = {}
    for precision, variants in chosen.items():
        for variant in variants:
            try:
                out[f"{precision} {variant}"] = train(CASES[case], variant, precision, folder)
            except Exception as error:
                raise AssertionError(f"{case}, {precision}, variant {variant!r}\n{traceback.format_exc()}") from error
    return out


def need(case: str) -> None:
    if CASES[case].requires is not None:
        pytest.importorskip(CASES[case].requires)


@pytest.mark.parametrize(
    ("case", "world"),
    [(case, world) for case in CASES for world in WORLDS if world == FULL_WORLD or "recomputed" not in case],
)
def test_all_variants_give_the_same_bits(case: str, world: int, tmp_path: Any) -> None:
    need(case)
    chosen = plan(case, world)
    results = run_ranks(all_variants, world, case, chosen, str(tmp_path), deadline=120)
    for precision, variants in chosen.items():
        first = results[0][f"{precision} {REFERENCE}"]
        assert first["moved"] and len(first["norms"]) == 4 and first["skipped"] == 0
        for rank, result in enumerate(results):
            reference = result[f"{precision} {REFERENCE}"]
            assert all(math.isfinite(loss) for loss in reference["losses"])
            for variant in variants:
                found = result[f"{precision} {variant}"]
                for what in ("losses", "norms", "weights", "buffers"):
                    # Each rank has its own data, and statistics of it.
                    expected = reference[what] if what in ("losses", "buffers") else first[what]
                    assert found[what] == expected, f"{what} of rank {rank} in {precision}, variant {variant!r}"


def recomputed_or_not(folder: str) -> dict[str, Any]:
    cases = ("recomputed", "recomputed, reentrant", "recomputed, deepspeed", "not recomputed")
    return {
        f"{variant} {precision}": {case: train(CASES[case], variant, precision, folder) for case in cases}
        for variant in (REFERENCE, SHARDED)
        for precision in ("fp32", "bf16")
    }


def test_recomputation_changes_no_bit(tmp_path: Any) -> None:
    """Dropout included: recomputation draws the random numbers of the first time."""
    for result in run_ranks(recomputed_or_not, 2, str(tmp_path), deadline=120):
        for where, found in result.items():
            plain = found.pop("not recomputed")
            for case, numbers in found.items():
                assert numbers == plain, f"{case}, {where}"


def accumulated(case: str, accumulation: int, folder: str) -> dict[str, tuple[list[float], Any]]:
    out = {}
    for variant in VARIANTS:
        settings = config(variant, folder=folder, gradient_accumulation_steps=accumulation, optimizer=SGD)
        engine = start(settings, build(CASES[case]))
        norms = []
        for index in range(2 * accumulation):
            micro_step(engine, CASES[case], index, torch.float32)
            if engine.global_steps > len(norms):
                norms.append(engine.get_global_grad_norm())
        out[variant] = (norms, values(engine.module))
        engine.destroy()
    return out


@pytest.mark.parametrize(
    ("case", "accumulation", "world"), [("gpt", 2, 2), ("lstm", 4, 2), ("experts", 3, 3), ("reused", 2, 1)]
)
def test_accumulation_agrees_to_a_millionth(case: str, accumulation: int, world: int, tmp_path: Any) -> None:
    for result in run_ranks(accumulated, world, case, accumulation, str(tmp_path), deadline=120):
        norms, weights = result[REFERENCE]
        assert len(norms) == 2
        for variant in OTHERS:
            found = result[variant]
            assert max(abs(a - b) / b for a, b in zip(found[0], norms, strict=True)) < 1e-6, variant
            assert apart(found[1], weights) < 1e-6, variant
