"""Saving and resuming through the engine's public face."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import run_ranks
from toy import Regression, build, config, digest, micro_step, run, start, tokens

SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 0.02, "total_num_steps": 12}}
FP16 = {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 2}


def entries(folder: str) -> list[str]:
    """What is in a checkpoint directory, but for the scripts that are put beside checkpoints."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".py"))


def settings(stage: int, precision: str, accumulation: int = 1) -> dict[str, Any]:
    more: dict[str, Any] = {"scheduler": SCHEDULE, "gradient_clipping": 1.0}
    if precision == "fp16":
        more["fp16"] = FP16
    return config(stage, precision, accumulation, **more)


def state_of(engine: Any) -> dict[str, Any]:
    return {
        "weights": digest(engine.module),
        "counters": (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps),
        "rate": engine.get_lr(),
        "scale": engine.loss_scale(),
        "schedule": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None,
        "random": (torch.rand(2).tolist(), random.random()),
    }


def through_and_resumed(folder: str, precision: str, saved_at: int, loaded_at: int) -> tuple[Any, Any, Any]:
    """Twelve micro-steps in one go, and 6 + 6 with a fresh engine, with dropout."""
    # Across stages bits are the same without accumulation: stage 2 reduces each micro-batch.
    accumulation = 2 if saved_at == loaded_at else 1
    engine = start(settings(saved_at, precision, accumulation), build(dropout=0.3))
    torch.manual_seed(1234 + engine.global_rank)
    random.seed(engine.global_rank)
    run(engine, 6)
    assert engine.save_checkpoint(folder, f"{precision}{saved_at}", client_state={"note": [1, "two"]}) is True
    rest = run(engine, 6, first=6)
    through = state_of(engine)
    engine.destroy()

    engine = start(settings(loaded_at, precision, accumulation), build(dropout=0.3, seed=999))
    torch.manual_seed(0)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None and Path(path).name == f"{precision}{saved_at}"
    assert client_state == {"note": [1, "two"]}
    again = run(engine, 6, first=6)
    return (
        (rest["losses"], rest["norms"], through),
        (again["losses"], again["norms"], state_of(engine)),
        engine.loaded_checkpoint_dp_world_size,
    )


@pytest.mark.parametrize(
    ("precision", "saved_at", "loaded_at"),
    [
        ("fp32", 0, 2),
        ("fp32", 2, 2),
        ("bf16", 1, 1),
        ("bf16", 2, 0),
        ("fp16", 2, 2),
        ("fp16", 0, 1),
        ("fp32", 3, 3),
        ("bf16", 3, 1),
        ("fp32", 2, 3),
        ("fp16", 1, 3),
    ],
)
def test_a_resumed_run_gives_the_bits_of_one_that_never_stopped(
    tmp_path: Path, precision: str, saved_at: int, loaded_at: int
) -> None:
    for through, again, world in run_ranks(through_and_resumed, 2, str(tmp_path), precision, saved_at, loaded_at):
        assert through == again
        assert world == 2


def client_resume(folder: str, precision: str, saved_at: int, loaded_at: int) -> tuple[Any, Any]:
    def make(stage: int) -> Any:
        model = build()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return start(
            config(stage, precision, optimizer=None),
            model,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
        )

    engine = make(saved_at)
    run(engine, 3)
    engine.save_checkpoint(folder, "client")
    through = run(engine, 3, first=3)
    rate = engine.get_lr()
    engine.destroy()
    engine = make(loaded_at)
    run(engine, 1, first=50)  # away from the start: everything has to come from the checkpoint
    engine.load_checkpoint(folder, "client")
    again = run(engine, 3, first=3)
    return (through, rate), (again, engine.get_lr())


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(0, 0), (1, 1), (0, 2), (2, 0), (3, 3), (3, 1), (0, 3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_client_optimizer_resumes_bit_exactly(tmp_path: Path, precision: str, saved_at: int, loaded_at: int) -> None:
    for through, again in run_ranks(client_resume, 2, str(tmp_path), precision, saved_at, loaded_at):
        assert through == again


def write_on(folder: str, client: bool) -> tuple[str, float]:
    engine = start_for_worlds(2, client)
    for index in range(3):
        loss = engine(*tokens(index, 0))  # the same data on every rank, so that the world's size does not matter
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder, "w", client_state={"rank": engine.global_rank})
    return digest(engine.module), engine.global_steps


def start_for_worlds(stage: int, client: bool) -> Any:
    model = build()
    if client:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return start(config(stage, "bf16", optimizer=None), model, optimizer=optimizer)
    return start(config(stage, "bf16"), model)


def read_on(folder: str, client: bool, stage: int) -> tuple[str, int, Any, str]:
    engine = start_for_worlds(stage, client)
    _, state = engine.load_checkpoint(folder)
    loaded = digest(engine.module)
    for index in range(3, 6):
        loss = engine(*tokens(index, 0))
        engine.backward(loss)
        engine.step()
    return loaded, engine.global_steps, state, digest(engine.module)


@pytest.mark.parametrize("client", [False, True])
def test_any_world_reads_what_any_other_wrote(tmp_path: Path, client: bool) -> None:
    finals = set()
    for world in (1, 3):
        folder = tmp_path / str(world)
        written = run_ranks(write_on, world, str(folder), client)
        for readers, stage in ((1, 1), (2, 3), (4, 1)):
            found = run_ranks(read_on, readers, str(folder), client, stage)
            for rank, (loaded, steps, state, final) in enumerate(found):
                assert loaded == written[0][0]
                assert steps == 6
                assert state == {"rank": rank if rank < world else 0}
                finals.add(final)
    assert len(finals) == 1, "moments or masters were not carried over"


def tags(folder: str, rule: str) -> tuple[str, list[str], list[str]]:
    engine = start(config(1, checkpoint={"tag_validation": rule}))
    micro_step(engine, 0)
    said: list[str] = []
    import deepspeed.runtime.engine_checkpoint as face

    face.warning_once = said.append
    try:
        for _ in range(2):
            engine.save_checkpoint(folder, 0.25 + engine.global_rank)
        return "", entries(folder), said
    except Exception as error:
        return f"{type(error).__name__}: {error}", os.listdir(folder), said


def test_tags_that_differ(tmp_path: Path) -> None:
    for name in ("WARN", "IGNORE", "FAIL"):
        (tmp_path / name).mkdir()
    for rank, (error, files, said) in enumerate(run_ranks(tags, 2, str(tmp_path / "WARN"), "WARN")):
        assert (error, files) == ("", ["0.25", "latest"])
        assert bool(said) == (rank == 0)
    for error, files, said in run_ranks(tags, 2, str(tmp_path / "IGNORE"), "IGNORE"):
        assert (error, files, said) == ("", ["0.25", "latest"], [])
    for error, files, _ in run_ranks(tags, 2, str(tmp_path / "FAIL"), "FAIL"):
        assert "rank 0 has `0.25`, rank 1 has `1.25`" in error
        assert "pass the same tag on all ranks" in error
        assert files == []


def default_tag(folder: str) -> tuple[Any, ...]:
    engine = start(config(2))
    assert engine.load_checkpoint(folder) == (None, None)
    run(engine, 2)
    engine.save_checkpoint(folder)
    engine.save_checkpoint(folder, tag="aside", save_latest=False)
    path, state = engine.load_checkpoint(folder)
    missing = ""
    try:
        engine.load_checkpoint(folder, "nowhere")
    except Exception as error:
        missing = f"{type(error).__name__}: {error}"
    return os.path.basename(path), state, missing, entries(folder)


def test_the_default_tag_and_the_latest(tmp_path: Path) -> None:
    for name, state, missing, files in run_ranks(default_tag, 2, str(tmp_path)):
        assert (name, state) == ("global_step2", {})
        assert "CheckpointError" in missing and "nowhere" in missing and "global_step2" in missing
        assert files == ["aside", "global_step2", "latest"]
    assert (tmp_path / "latest").read_text().strip() == "global_step2"


class Progress:
    """A client state of a class of one's own."""

    def __init__(self, epoch: int):
        self.epoch = epoch


def own_class(folder: str) -> tuple[str, int]:
    engine = start(config(1))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "own", client_state={"progress": Progress(4)})
    try:
        engine.load_checkpoint(folder, "own")
        refused = ""
    except ValueError as error:
        refused = str(error)
    _, state = engine.load_checkpoint(folder, "own", trust_client_state=True)
    return refused, state["progress"].epoch


def test_code_in_a_checkpoint_is_not_executed_unasked(tmp_path: Path) -> None:
    for refused, epoch in run_ranks(own_class, 2, str(tmp_path)):
        assert "trust_client_state=True" in refused and "test_resume.Progress" in refused
        assert epoch == 4


def own_class_on_one_rank(folder: str) -> tuple[str, str]:
    engine = start(config(1))
    micro_step(engine, 0)
    state: dict[str, Any] = {"progress": Progress(4)} if engine.global_rank == 1 else {"progress": 4}
    engine.save_checkpoint(folder, "one", client_state=state)
    try:
        engine.load_checkpoint(folder, "one")
        refused = ""
    except ValueError as error:
        refused = str(error)
    micro_step(engine, 1)
    _, state = engine.load_checkpoint(folder, "one", trust_client_state=True)
    return refused, type(state["progress"]).__name__


def test_a_client_state_refused_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    (one, number), (other, progress) = run_ranks(own_class_on_one_rank, 2, str(tmp_path), deadline=40)
    assert one == other
    assert one.startswith("rank 1: the client_state of checkpoint ") and "trust_client_state=True" in one
    assert (number, progress) == ("int", "Progress")


def parts(folder: str) -> dict[str, Any]:
    engine = start(settings(1, "bf16"))
    run(engine, 3)
    engine.save_checkpoint(folder, "p", client_sd={"a": 1})
    saved = digest(engine.module)
    run(engine, 2, first=3)
    rate, steps = engine.get_lr(), engine.global_steps
    out: dict[str, Any] = {}

    engine.load_checkpoint(folder, "p", load_module_only=True)
    out["module only"] = (digest(engine.module) == saved, engine.global_steps == steps, engine.get_lr() == rate)

    engine.load_checkpoint(folder, "p", load_lr_scheduler_states=False, load_optimizer_states=False)
    out["no optimizer"] = (digest(engine.module) == saved, engine.global_steps)
    try:
        engine.save_checkpoint(folder, "q", client_state={}, client_sd={})
    except ValueError as error:
        out["both names"] = str(error)
    try:
        engine.save_checkpoint("", "q")
    except ValueError as error:
        out["no folder"] = str(error)
    return out


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    for found in run_ranks(parts, 2, str(tmp_path)):
        assert found["module only"] == (True, True, True)
        assert found["no optimizer"] == (True, 3)
        assert "client_sd is another name" in found["both names"]
        assert "save_dir is empty" in found["no folder"]


def other_model(folder: str) -> dict[str, str]:
    engine = start(config(1))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "toy")
    engine.destroy()
    found = {}
    for name, model in (("regression", build(Regression)), ("lacking", build(unused=False))):
        other = start(config(1), model)
        try:
            other.load_checkpoint(folder, "toy")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        other.destroy()
    other = start(config(1), build(unused=False, seed=3))
    other.load_checkpoint(folder, "toy", load_module_strict=False)
    found["loose"] = str(digest(other.module.token) == digest(engine.module.token))
    return found


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    for found in run_ranks(other_model, 2, str(tmp_path)):
        assert "has no parameter `first.weight`" in found["regression"]
        assert "the model has no parameter `unused`" in found["lacking"]
        assert "load_module_strict=False" in found["lacking"]
        assert found["loose"] == "True"


def weights_for_others(folder: str) -> tuple[list[str], list[str], bool]:
    engine = start(config(2, "bf16"))
    run(engine, 2)
    assert engine.save_16bit_model(folder, "model.bin") is True
    assert engine.save_fp16_model(os.path.join(folder, "deeper"), exclude_frozen_parameters=True) is True
    torch.distributed.barrier()
    whole = torch.load(os.path.join(folder, "model.bin"))
    thawed = torch.load(os.path.join(folder, "deeper", "pytorch_model.bin"))
    same = all(torch.equal(value, whole[name]) for name, value in engine.module.state_dict().items())
    assert (engine._zero3_consolidated_16bit_state_dict() is None) == (engine.global_rank != 0)
    return sorted(str(v.dtype) for v in whole.values())[:1], sorted(set(whole) - set(thawed)), same


def test_weights_as_one_torch_file(tmp_path: Path) -> None:
    for dtypes, left_out, same in run_ranks(weights_for_others, 2, str(tmp_path)):
        assert dtypes == ["torch.bfloat16"]
        assert left_out == ["frozen_scale"]
        assert same


def frozen_apart(folder: str) -> tuple[bool, float]:
    engine = start(config(1))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "f", exclude_frozen_parameters=True)
    engine.save_checkpoint(folder, "whole")
    model = build()
    model.frozen_scale.data.fill_(3.0)
    other = start(config(1), model)
    other.load_checkpoint(folder, "f", load_module_strict=False)
    kept = other.module.frozen_scale[0].item()
    other.load_checkpoint(folder, "whole")
    return torch.equal(engine.module.frozen_scale, other.module.frozen_scale), kept


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    for restored, kept in run_ranks(frozen_apart, 1, str(tmp_path)):
        assert restored
        assert kept == 3.0


def module_state(folder: str) -> bool:
    """load_module_state_dict refreshes the fp32 masters: the next step starts from the new weights."""
    engine = start(config(2, "bf16", optimizer={"type": "SGD", "params": {"lr": 0.0}}))
    other = build(seed=55)
    engine.load_module_state_dict({"module": other.state_dict()})
    micro_step(engine, 0)
    expected = {name: value.bfloat16() for name, value in other.state_dict().items()}
    return all(torch.equal(value, expected[name]) for name, value in engine.module_state_dict().items())


def test_weights_loaded_by_hand_become_the_masters(tmp_path: Path) -> None:
    assert all(run_ranks(module_state, 2, str(tmp_path)))


def overwrite(folder: str) -> list[str]:
    engine = start(config(1))
    found = []
    for index in range(3):
        micro_step(engine, index)
        engine.save_checkpoint(folder, "same", client_state={"index": index})
    engine.load_checkpoint(folder)
    found.append(str(engine.global_steps))
    return found + entries(folder)


def test_a_tag_may_be_written_again(tmp_path: Path) -> None:
    for found in run_ranks(overwrite, 2, str(tmp_path)):
        assert found == ["3", "latest", "same"]
    manifest = json.loads((tmp_path / "same" / "manifest.json").read_text())
    assert manifest["world"] == 2


def optimizer_state_dict() -> tuple[Any, Any]:
    engine = start(settings(1, "fp16"))
    run(engine, 3)
    state = engine.optimizer.state_dict()
    other = start(settings(1, "fp16"))
    other.optimizer.load_state_dict(state)
    return (
        (engine.global_steps, engine.loss_scale(), engine.get_lr()),
        (other.global_steps, other.loss_scale(), other.get_lr()),
    )


def test_the_optimizers_own_state_dict() -> None:
    for one, other in run_ranks(optimizer_state_dict, 2):
        assert one == other


def linear_buffers(folder: str) -> bool:
    class Odd(nn.Module):
        """Buffers of odd kinds: not persistent, boolean, empty, a scalar."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mask", torch.tensor([True, False, True]))
            self.register_buffer("nothing", torch.zeros(0))
            self.register_buffer("count", torch.tensor(3, dtype=torch.int64))
            self.register_buffer("cache", torch.ones(2), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return self.layer(x).sum()

    engine = start(config(1), Odd())
    engine.backward(engine(torch.ones(1, 2)))
    engine.step()
    engine.save_checkpoint(folder, "odd")
    other = start(config(1), Odd())
    other.load_checkpoint(folder)
    return digest(engine.module) == digest(other.module) and other.module.count.item() == 4


def test_buffers_of_odd_kinds(tmp_path: Path) -> None:
    assert all(run_ranks(linear_buffers, 1, str(tmp_path)))
