"""What the engine says when it is used wrongly, when numbers or files are broken, and when ranks go separate ways."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import job  # noqa: F401  puts the toys on the path of the ranks
from harness import run_outcomes, run_ranks
from toy import Regression, build, config, digest, micro_step, start, tokens


def said(function: Any, *args: Any, **kwargs: Any) -> str:
    """The exception that the call raises, as text; empty without one."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# -- arguments ---------------------------------------------------------------------------------------------------------


def bad_arguments(path: str) -> dict[str, str]:
    from argparse import Namespace

    import deepspeed

    good = config(1)
    model = build()
    named = Namespace(deepspeed_config=path)
    return {
        "no model": said(deepspeed.initialize, config=good),
        "two configs": said(deepspeed.initialize, args=named, model=model, config=good),
        "no config": said(deepspeed.initialize, model=model),
        "no file": said(deepspeed.initialize, model=model, config="/nonexistent/ds_config.json"),
        "a number": said(deepspeed.initialize, model=model, config=3),
        "optimizer": said(deepspeed.initialize, model=model, optimizer="adam", config=good),
        "strangers": said(
            deepspeed.initialize,
            model=model,
            config=config(1, optimizer=None),
            optimizer=torch.optim.SGD(build(seed=1).parameters(), lr=0.1),
        ),
        "parameters": said(deepspeed.initialize, model=model, model_parameters=3, config=good),
        "unknown optimizer": said(deepspeed.initialize, model=model, config={**good, "optimizer": {"type": "Adamm"}}),
        "optimizer params": said(
            deepspeed.initialize,
            model=model,
            config={**good, "optimizer": {"type": "RMSprop", "params": {"learning_rate": 1}}},
        ),
        "not built": said(
            deepspeed.initialize,
            model=model,
            config={**good, "zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        ),
        "misspelt": said(deepspeed.initialize, model=model, config={**good, "gradient_cliping": 1.0}),
        "batches": said(deepspeed.initialize, model=model, config={**good, "train_batch_size": 7}),
        "both": said(
            deepspeed.initialize, model=model, config={**good, "fp16": {"enabled": True}, "bf16": {"enabled": True}}
        ),
        "needs": said(deepspeed.init_distributed, dist_init_required=False),
    }


def test_bad_arguments_say_what_to_do(tmp_path: Path) -> None:
    (found,) = run_ranks(bad_arguments, 1, str(tmp_path / "c.json"))
    for case, parts in {
        "no model": ("AssertionError", "requires a model"),
        "two configs": ("AssertionError", "two configs", "c.json"),
        "no config": ("AssertionError", "no config", "--deepspeed_config"),
        "no file": ("/nonexistent/ds_config.json",),
        "a number": ("DeepSpeedConfigError", "int"),
        "optimizer": ("TypeError", "torch.optim.Optimizer or a callable", "str"),
        "strangers": ("ValueError", "not trainable parameters of the model", "model.parameters()"),
        "parameters": ("TypeError", "model_parameters", "int"),
        "unknown optimizer": ("DeepSpeedConfigError", "Adamm"),
        "optimizer params": ("DeepSpeedConfigError", "learning_rate"),
        "not built": ("zero_quantized_weights", "not built"),
        "misspelt": ("DeepSpeedConfigError", "gradient_cliping", "gradient_clipping"),
        "batches": ("DeepSpeedConfigError", "7", "train_batch_size"),
        "both": ("DeepSpeedConfigError", "fp16", "bf16"),
    }.items():
        for part in parts:
            assert part in found[case], (case, found[case])


def bad_losses() -> dict[str, str]:
    engine = start(config(2))
    loss = engine(*tokens(0, 0))
    found = {
        "not a scalar": said(engine.backward, torch.ones(3, requires_grad=True)),
        "detached": said(engine.backward, loss.detach()),
        "a number": said(engine.backward, loss.item()),
        "no backward": said(engine.step),
        "optimizer.step": said(engine.optimizer.step),
    }
    engine.destroy()
    return {**found, "destroyed": said(engine, *tokens(0, 0)), "gone": said(engine.step)}


def test_a_loop_that_is_wrong_says_so() -> None:
    (found,) = run_ranks(bad_losses, 1)
    for case, parts in {
        "not a scalar": ("ValueError", "scalar", "(3,)"),
        "detached": ("ValueError", "does not depend on any trainable parameter"),
        "a number": ("ValueError", "float"),
        "no backward": ("no parameter has a gradient", "backward(loss)"),
        # It steps the engine.
        "optimizer.step": ("no parameter has a gradient", "backward(loss)"),
        "destroyed": ("RuntimeError", "destroyed"),
        "gone": ("RuntimeError", "destroyed"),
    }.items():
        for part in parts:
            assert part in found[case], (case, found[case])


def meet_at_a_taken_port() -> str:
    import deepspeed

    return said(deepspeed.init_distributed)


def test_a_port_in_use_without_the_launcher() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        # Only rank 0 listens there; the others would wait for it.
        (outcome,) = run_outcomes(meet_at_a_taken_port, 1, env={"MASTER_PORT": port}, deadline=40)
    assert f"port {port}" in outcome.value and "in use" in outcome.value, outcome.describe()
    assert "--master_port" in outcome.value


# -- numbers -----------------------------------------------------------------------------------------------------------


def nan_on_one(stage: int) -> tuple[str, bool, int, float]:
    engine = start(config(stage))
    micro_step(engine, 0)
    before = digest(engine.module)
    loss = engine(*tokens(1, engine.global_rank))
    if engine.global_rank == 1:
        loss = loss + engine.module.mix.bias.sum() * float("nan")
    engine.backward(loss)
    error = said(engine.step)
    untouched = digest(engine.module) == before
    # The engine is still of use: the client may leave this batch out.
    return error, untouched, engine.global_steps, micro_step(engine, 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_nan_at_fp32_names_the_parameter_and_changes_nothing(stage: int) -> None:
    for error, untouched, steps, loss in run_ranks(nan_on_one, 2, stage):
        assert error.startswith("NonFiniteGradientError: ")
        assert "the gradient of `mix.bias` is NaN" in error
        assert "no weight has been changed" in error
        assert untouched and steps == 1
        assert loss == loss  # not NaN


def nan_in_bf16() -> tuple[bool, int, float, bool]:
    engine = start(config(2, "bf16"))
    before = digest(engine.module)
    engine.backward(engine(*tokens(1, engine.global_rank)) * float("inf"))
    engine.step()
    return (
        digest(engine.module) == before,
        engine.skipped_steps,
        engine.get_global_grad_norm(),
        engine.optimizer.overflow,
    )


def test_a_nan_in_16_bits_skips_the_step() -> None:
    assert run_ranks(nan_in_bf16, 2) == [(True, 1, float("inf"), True)] * 2


def unused(allowed: bool) -> tuple[str, list[str]]:
    from deepspeed.utils import logger

    messages: list[str] = []
    logger.warning = lambda text, *args, **_: messages.append(text % args if args else text)  # type: ignore[method-assign]
    zero = {"stage": 1, "ignore_unused_parameters": allowed}
    engine = start(config(1, zero_optimization=zero))
    error = said(lambda: [micro_step(engine, index) for index in range(3)])
    return error, [text for text in messages if "no gradient" in text]


def test_a_parameter_without_gradient() -> None:
    for rank, (error, messages) in enumerate(run_ranks(unused, 2, True)):
        assert error == ""
        assert len(messages) <= 1
        assert rank > 0 or ": unused." in messages[0]
    for error, _ in run_ranks(unused, 2, False):
        assert "no gradient reached 1 of" in error and "unused" in error and "ignore_unused_parameters" in error


# -- ranks that go separate ways -----------------------------------------------------------------------------------------


def leave_early() -> int:
    engine = start(config(2))
    for index in range(1000):
        if engine.global_rank == 1 and index == 3:
            return index
        micro_step(engine, index)
    return -1


def raise_early() -> None:
    engine = start(config(2))
    for index in range(1000):
        if engine.global_rank == 2 and index == 3:
            raise KeyError("the reason")
        micro_step(engine, index)


def die_early(backend: str | None) -> None:
    import deepspeed

    deepspeed.init_distributed(backend)
    engine = start(config(1))
    for index in range(1000):
        if engine.global_rank == 0 and index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        micro_step(engine, index)


def test_the_others_learn_who_has_gone() -> None:
    outcomes = run_outcomes(leave_early, 3, deadline=30)
    assert outcomes[1].value == 3
    for rank in (0, 2):
        assert outcomes[rank].error_type == "CommError" and "rank 1 " in outcomes[rank].error, outcomes[rank].describe()

    outcomes = run_outcomes(raise_early, 3, deadline=30)
    assert outcomes[2].error_type == "KeyError"
    for rank in (0, 1):
        assert outcomes[rank].error_type == "CommError" and "rank 2 " in outcomes[rank].error, outcomes[rank].describe()


@pytest.mark.parametrize("backend", [None, "cpu:gloo"])
def test_the_others_do_not_wait_for_the_dead(backend: str | None) -> None:
    outcomes = run_outcomes(die_early, 3, backend, deadline=40, grace=15)
    assert outcomes[0].status == "died"
    for rank in (1, 2):
        error = outcomes[rank].error
        assert outcomes[rank].error_type == "CommError", outcomes[rank].describe()
        assert error.startswith("rank 0 (pid "), error


def fall_behind() -> str:
    engine = start(config(2))
    micro_step(engine, 0)
    if engine.global_rank == 1:
        engine._native.mark("forward")
        time.sleep(6)
        return ""
    return said(micro_step, engine, 1)


def test_a_rank_that_never_comes_is_named() -> None:
    outcomes = run_outcomes(fall_behind, 2, deadline=40, env={"DEEPSPEED_TIMEOUT": "0.05"})
    error = outcomes[0].value
    assert error.startswith("CommError") and "rank 1" in error and "reduce_scatter" in error, outcomes[0].describe()


def save_on_one(folder: str, then: str) -> tuple[str, float]:
    engine = start(config(1))
    micro_step(engine, 0)
    began = time.monotonic()
    if engine.global_rank == 0:
        error = said(engine.save_checkpoint, folder, "lonely")
    elif then == "train":
        error = said(lambda: [micro_step(engine, index) for index in range(1, 1000)])
    else:
        error = ""
    return error, time.monotonic() - began


@pytest.mark.parametrize("then", ["train", "end"])
def test_save_checkpoint_on_one_rank_only(tmp_path: Path, then: str) -> None:
    for rank, (error, seconds) in enumerate(run_ranks(save_on_one, 2, str(tmp_path), then, deadline=40)):
        if then == "train" or rank == 0:
            assert error.startswith("CommError"), error
            assert "checkpoint" in error, error
        assert seconds < 10
    assert not (tmp_path / "latest").exists()


def different_models() -> str:
    model = build() if os.environ["RANK"] == "0" else build(Regression)
    return said(start, config(1), model)


def different_sizes() -> str:
    width = 4 + int(os.environ["RANK"])
    return said(start, config(1), nn.Linear(width, 3))


def test_different_models_are_told_apart() -> None:
    for error in run_ranks(different_models, 2):
        assert "frozen_scale [18] torch.float32" in error and "first.weight [11, 6] torch.float32" in error, error
    for error in run_ranks(different_sizes, 2):
        assert "weight [3, 4]" in error and "weight [3, 5]" in error, error


def different_settings(kind: str) -> str:
    other = os.environ["RANK"] == "1"
    settings = config(1)
    model = build()
    if kind == "optimizer" and other:
        settings["optimizer"] = {"type": "Lion", "params": {}}
    elif kind == "stage" and other:
        settings["zero_optimization"] = {"stage": 2}
    elif kind == "accumulation" and other:
        settings["gradient_accumulation_steps"] = 4
    elif kind == "precision" and other:
        settings["bf16"] = {"enabled": True}
    elif kind == "frozen" and other:
        model.up.weight.requires_grad_(False)
    return said(start, settings, model)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("optimizer", ("the optimizer", "Adam", "Lion")),
        ("stage", ("the ZeRO stage: rank 0 has 1, rank 1 has 2",)),
        ("accumulation", ("train_batch_size: rank 0 has 4, rank 1 has 16",)),
        ("precision", ("bf16: rank 0 has False, rank 1 has True",)),
        ("frozen", ("the trainable parameters", "rank 0 has up.weight")),
    ],
)
def test_different_settings_are_told_apart(kind: str, parts: tuple[str, ...]) -> None:
    for error in run_ranks(different_settings, 2, kind):
        assert error.startswith("DeepSpeedConfigError: ranks disagree on "), error
        for part in parts:
            assert part in error, error


# -- files ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory of its own; skips where that is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def save_to(folder: str) -> tuple[str, str, float]:
    engine = start(config(2), build(nn.Linear, in_features=256, out_features=256))
    engine.backward(engine(torch.ones(1, 256)).sum())
    engine.step()
    error = said(engine.save_checkpoint, folder, "first")
    # A failed save does not end the run.
    engine.backward(engine(torch.ones(1, 256)).sum())
    engine.step()
    return error, digest(engine.module), engine.global_steps


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for error, _, steps in run_ranks(save_to, 2, str(tmp_path / "file" / "saves")):
        assert error.startswith("CheckpointError") and str(tmp_path / "file") in error, error
        assert steps == 2
    with mounted(tmp_path / "readonly", "ro,size=1m") as folder:
        for error, _, _ in run_ranks(save_to, 2, str(folder / "saves")):
            assert error.startswith("CheckpointError") and "ead-only" in error, error


def test_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=300k") as folder:
        for error, _, steps in run_ranks(save_to, 2, str(folder)):
            assert error.startswith("CheckpointError") and "No space left" in error, error
            assert steps == 2
        left = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0]
        assert not (folder / "latest").exists() and not left, left


def save_good(folder: str) -> None:
    engine = start(config(2, "bf16"))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "good", client_state={"a": 1})


def load_bad(folder: str) -> tuple[str, bool]:
    engine = start(config(2, "bf16"), build(seed=5))
    before = digest(engine.module)
    error = said(engine.load_checkpoint, folder)
    return error, digest(engine.module) == before


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "manifest"])
def test_a_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    run_ranks(save_good, 2, str(tmp_path))
    victim = max((p for p in (tmp_path / "good").iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "cut":
        os.truncate(victim, victim.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(victim.read_bytes())
        data[-100] ^= 1
        victim.write_bytes(data)
    elif damage == "gone":
        victim.unlink()
    else:
        victim = tmp_path / "good" / "manifest.json"
        victim.write_text(victim.read_text()[:-20])
    for error, untouched in run_ranks(load_bad, 2, str(tmp_path)):
        assert error.startswith("CheckpointError"), error
        assert victim.name in error, error
        assert untouched, "weights have changed although the checkpoint is damaged"


def load_latest(folder: str) -> tuple[str | None, int]:
    engine = start(config(2, "bf16"), build(seed=5))
    path, _ = engine.load_checkpoint(folder)
    return path, engine.global_steps


def test_where_latest_names_nothing_the_newest_complete_one_is_taken(tmp_path: Path) -> None:
    run_ranks(save_good, 2, str(tmp_path))
    (tmp_path / "latest").write_text("nowhere")
    assert run_ranks(load_latest, 2, str(tmp_path)) == [(str(tmp_path / "good"), 1)] * 2
