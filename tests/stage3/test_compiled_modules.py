"""engine.compile() where weights are gathered: each module that runs between two gatherings is compiled by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from harness import run_ranks
from models import CASES, build
from variants import config, micro_step, start, values

STEPS = 3


def gathering(backend: str | None) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def modules_compiled(engine: Any) -> list[torch.nn.Module]:
    return [m for m in engine.module.modules() if m._compiled_call_impl is not None]


def with_and_without(names: list[str], backend: str | None) -> dict[str, Any]:
    """Losses and weights of runs with and without compilation, and what was compiled."""
    gathering(backend)
    lookup = torch._dynamo.backends.registry.lookup_backend
    out = {}
    for name in names:
        case = CASES[name]
        plain = start(config("3"), build(case))
        expected = [micro_step(plain, case, index, torch.float32) for index in range(STEPS)]
        graphs: list[torch.fx.GraphModule] = []

        def compiler(graph: torch.fx.GraphModule, inputs: Any, graphs: Any = graphs) -> Any:
            graphs.append(graph)
            # As the default compiler does: forward and backward are traced together, what backward needs is saved.
            return lookup("aot_eager")(graph, inputs)

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        engine = start(config("3"), build(case))
        engine.compile(backend=compiler)
        found = []
        for index in range(STEPS):
            if index == 1:
                evaluated(engine, case)
            found.append(micro_step(engine, case, index, torch.float32))
            assert all(p.numel() == 0 for p in engine.module.parameters()), "something is whole after a step"
        out[name] = {
            "losses": (found, expected),
            "weights": (values(engine.module), values(plain.module)),
            "compiled": len(modules_compiled(engine)),
            "graphs": len(graphs),
            "breaks": dict(torch._dynamo.utils.counters["graph_break"]),
        }
        twin = copy.deepcopy(engine.module)
        assert all(m._compiled_call_impl is None for m in twin.modules())
        engine.destroy()
        assert modules_compiled(engine) == []
        plain.destroy()
    return out


def evaluated(engine: Any, case: Any) -> None:
    arguments, keywords = case.batch(engine.global_rank, 0, torch.float32)
    engine.eval()
    with torch.no_grad():
        engine(*arguments, **keywords)
    engine.train()


def test_compiled_modules_train_the_same() -> None:
    names = ["gpt", "recomputed", "outside", "tied and frozen"]
    check(run_ranks(with_and_without, 2, names, "cpu:gloo", deadline=240))


def test_compiled_modules_on_a_device_train_the_same() -> None:
    check(run_ranks(with_and_without, 1, ["gpt"], None, env={"DS_TORCH_DEVICE": "1"}, deadline=240))


def check(results: list[dict[str, Any]]) -> None:
    for found in results:
        for name, run in found.items():
            losses, expected = run["losses"]
            assert losses == pytest.approx(expected, rel=1e-5), name
            weights, reference = run["weights"]
            torch.testing.assert_close(weights, reference, rtol=1e-4, atol=1e-6, msg=name)
            assert run["compiled"] > 0 and run["graphs"] > 0, name
            if name == "gpt":
                assert run["breaks"] == {}, "what gathers was traced"
