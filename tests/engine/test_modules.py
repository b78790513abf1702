"""What models may look like: what they return, tied, frozen, unused and empty parameters, buffers, inputs."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from harness import run_ranks
from toy import Regression, build, config, digest, flat, micro_step, points, run, start, tokens


def outputs(stage: int) -> list[str]:
    found = []
    for returns in ("loss", "dict", "dataclass"):
        engine = start(config(stage), build(Regression, returns=returns))
        for index in range(3):
            out = engine(*points(index, engine.global_rank))
            loss = out if returns == "loss" else out["loss"] if returns == "dict" else out.loss
            if returns == "dict":
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
        found.append(digest_of_parameters(engine.module))
        engine.destroy()
    return found


def digest_of_parameters(module: nn.Module) -> str:
    return str(flat(module))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_modules_return_what_they_like(stage: int) -> None:
    for found in run_ranks(outputs, 2, stage):
        assert found[0] == found[1] == found[2]


def parameters_of_a_toy(stage: int) -> dict[str, Any]:
    engine = start(config(stage))
    module = engine.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run(engine, 3)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    return {
        "changed": changed,
        "tied": module.head.weight is module.token.weight,
        "frozen": torch.equal(module.frozen_scale, before["frozen_scale"]),
        "gradients": [name for name, p in module.named_parameters() if p.grad is not None],
        "norm": engine.get_global_grad_norm(),
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_frozen_unused_and_empty_parameters(stage: int) -> None:
    for found in run_ranks(parameters_of_a_toy, 2, stage):
        assert {"token.weight", "mix.weight", "up.bias", "norm.weight"} <= found["changed"]
        assert not {"frozen_scale", "empty"} & found["changed"]
        assert found["tied"] and found["frozen"]
        assert found["gradients"] == []
        assert 0 < found["norm"] < float("inf")


def used_by_turns() -> tuple[bool, list[str]]:
    """Rank 1 uses a branch that rank 0 does not: the branch's gradient is the mean of one gradient and zero."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.common, self.branch = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
            x = self.common(x)
            return (self.branch(x) if use else x).square().mean()

    from deepspeed.utils import logger

    messages: list[str] = []
    logger.warning = lambda text, *args, **_: messages.append(text % args if args else text)  # type: ignore[method-assign]
    sgd = {"type": "SGD", "params": {"lr": 1.0}}
    engine = start(config(2, optimizer=sgd), build(Branches))
    x = torch.arange(6.0).view(2, 3) / 6
    engine.backward(engine(x, engine.global_rank == 1))
    engine.step()
    reference = build(Branches)
    (reference(x, True) / 2).backward()
    moved = reference.branch.weight - reference.branch.weight.grad
    return torch.allclose(engine.module.branch.weight, moved, atol=1e-6), messages


def test_a_branch_that_one_rank_uses() -> None:
    for close, messages in run_ranks(used_by_turns, 2):
        assert close
        assert not any("no gradient reached" in text for text in messages)


def buffers(folder: str) -> tuple[str, str, list[str]]:
    engine = start(config(1), build(Regression))
    run(engine, 3, make_batch=points)
    mine = digest(engine.module)
    engine.save_checkpoint(folder, "b")
    engine.destroy()
    other = start(config(2), build(Regression, seed=99))
    other.load_checkpoint(folder, "b")
    kept = [str(b.dtype) for b in other.module.buffers()]
    return mine, digest(other.module), kept


def test_batch_norm_is_saved_and_restored(tmp_path: Any) -> None:
    results = run_ranks(buffers, 1, str(tmp_path))
    mine, restored, dtypes = results[0]
    assert mine == restored
    assert dtypes == ["torch.float32", "torch.float32", "torch.int64"]


def casts(precision: str) -> dict[str, Any]:
    model = build(Regression)
    model.register_buffer("table", torch.arange(3.0))
    engine = start(config(1, precision), model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    parameters = {str(p.dtype) for p in engine.module.parameters()}
    kept = {str(b.dtype) for b in engine.module.buffers()}
    micro_step(engine, 0, lambda index, rank: points(index, rank, dtype))
    auto = start({**config(1, "fp16"), "fp16": {"enabled": True, "auto_cast": True}}, build(Regression))
    micro_step(auto, 0, points)
    return {"parameters": parameters, "buffers": kept, "steps": engine.global_steps, "auto": auto.global_steps}


def test_parameters_are_cast_and_buffers_are_not_but_for_statistics() -> None:
    for precision, name in (("bf16", "torch.bfloat16"), ("fp16", "torch.float16")):
        (found,) = run_ranks(casts, 1, precision)
        assert found == {
            "parameters": {name}, "buffers": {"torch.float32", name, "torch.int64"}, "steps": 1, "auto": 1
        }  # fmt: skip


def plain_torch_save() -> tuple[int, int]:
    engine = start(config(2, "bf16"), build(nn.Linear, in_features=64, out_features=64))
    engine.backward(engine(torch.ones(2, 64, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    buffer = io.BytesIO()
    torch.save(engine.module.state_dict(), buffer)
    return len(buffer.getvalue()), sum(p.nbytes for p in engine.module.parameters())


def test_a_state_dict_saved_by_torch_is_not_bloated() -> None:
    for saved, needed in run_ranks(plain_torch_save, 2):
        assert saved < needed + 4096


def evaluation() -> tuple[bool, float, str, str]:
    engine = start(config(2), build(dropout=0.5))
    engine.eval()
    before = digest(engine.module)
    with torch.no_grad():
        first, second = engine(*tokens(0, 0)), engine(*tokens(0, 0))
    assert not engine.training and not engine.module.training
    assert engine.train() is engine and engine.module.training
    micro_step(engine, 0)
    return torch.equal(first, second), first.item(), before, digest(engine.module)


def test_evaluation_leaves_no_trace() -> None:
    ((same, loss, before, after),) = run_ranks(evaluation, 1)
    assert same and loss > 0 and before != after


def two_losses() -> float:
    """A module called twice before one backward, and a loss that is made of both."""
    engine = start(config(2, optimizer={"type": "SGD", "params": {"lr": 0.1}}))
    engine.backward(engine(*tokens(0, engine.global_rank)) + engine(*tokens(1, engine.global_rank)))
    engine.step()
    model = build()
    for rank in range(engine.world_size):
        ((model(*tokens(0, rank)) + model(*tokens(1, rank))) / engine.world_size).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return max(abs(a - b) for a, b in zip(flat(model), flat(engine.module), strict=True))


def test_a_module_may_be_called_twice_before_backward() -> None:
    assert max(run_ranks(two_losses, 2)) < 1e-6


def retained() -> float:
    """Two backward passes through one graph in one accumulation."""
    engine = start(config(1, accumulation=2, optimizer={"type": "SGD", "params": {"lr": 0.1}}))
    loss = engine(*tokens(0, 0))
    engine.backward(loss, retain_graph=True)
    engine.step()
    engine.backward(loss)
    engine.step()
    model = build()
    model(*tokens(0, 0)).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return max(abs(a - b) for a, b in zip(flat(model), flat(engine.module), strict=True))


def test_a_graph_may_be_retained() -> None:
    assert max(run_ranks(retained, 1)) < 1e-6


def rank_dependent_seed() -> str:
    model = build(seed=100 + int(__import__("os").environ["RANK"]))
    return digest(start(config(1), model).module)


def test_all_ranks_start_from_rank_0() -> None:
    digests = run_ranks(rank_dependent_seed, 3)
    assert len(set(digests)) == 1
