"""What a run shows of itself: monitors, the flops profiler, the communication logger, timers."""

from __future__ import annotations

import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.profiling.flops_profiler import FlopsProfiler, get_model_profile
from deepspeed.utils.timer import SynchronizedWallClockTimer, ThroughputTimer
from harness import run_ranks

STEPS = 3


class Client:
    """Stands in for the packages of vendors."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options))

    def log(self, data: dict[str, float], step: int, commit: bool | None) -> None:
        self.calls.append((data, step))

    def start(self, **options: Any) -> Client:
        self.calls.append(("start", options))
        return self

    def set_name(self, name: str) -> None:
        self.calls.append(("name", name))

    def log_metric(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, step))


def train(folder: str) -> dict[str, Any]:
    wandb, comet = Client(), Client()
    for name, client in (("wandb", wandb), ("comet_ml", comet)):
        sys.modules[name] = types.SimpleNamespace(  # type: ignore[assignment]
            init=client.init, log=client.log, start=client.start
        )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 2},
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": "board"},
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "csv"},
        "wandb": {"enabled": True, "group": "g", "team": "t", "project": "p"},
        "comet": {"enabled": True, "samples_log_interval": 16, "project": "p", "experiment_name": "n"},
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": f"{folder}/flops.txt"},
        "comms_logger": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    losses = []
    for _ in range(STEPS):
        loss = engine(torch.ones(4, 8, dtype=torch.half)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    counted = deepspeed.comm.log_summary(return_dict=True)
    return {
        "losses": losses,
        "wandb": wandb.calls,
        "comet": comet.calls,
        "collectives": {name: sum(calls for calls, _ in sizes.values()) for name, sizes in (counted or {}).items()},
        "speed": engine.tput_timer.avg_samples_per_sec(),
        "timers": engine.get_wall_clock_timers(),
    }


def test_a_run_is_seen_by_all_monitors(tmp_path: Path) -> None:
    zero, one = run_ranks(train, 2, str(tmp_path))
    samples = [8, 16, 24]
    csv = {path.stem: path.read_text().splitlines() for path in (tmp_path / "csv").iterdir()}
    losses = csv["Train_Samples_train_loss"]
    assert losses[0] == "step,Train/Samples/train_loss"
    assert [float(line.split(",")[1]) for line in losses[1:]] == zero["losses"]
    assert [int(line.split(",")[0]) for line in losses[1:]] == samples
    assert csv["Train_Samples_lr"][1:] == [f"{at},0.01" for at in samples]
    assert csv["Train_Samples_loss_scale"][1:] == [f"{at},256" for at in samples]
    assert {"Train_Samples_grad_norm", "Train_Samples_elapsed_time_ms_forward"} <= csv.keys()
    (board,) = (tmp_path / "board").iterdir()
    events = [event for event in read_events(board.read_bytes()) if event[0] == "Train/Samples/train_loss"]
    assert [(step, value) for _, step, value in events] == [
        (at, pytest.approx(loss)) for at, loss in zip(samples, zero["losses"], strict=True)
    ]
    assert zero["wandb"][0] == ("init", {"project": "p", "group": "g", "entity": "t"})
    assert ({"Train/Samples/lr": 0.01}, 24) in zero["wandb"]
    assert zero["comet"][:2] == [("start", {"project": "p"}), ("name", "n")]
    # One value within 16 samples: not that at 16.
    assert [call[1] for call in zero["comet"] if call[0] == "Train/Samples/lr"] == [8, 24]
    assert one["wandb"] == one["comet"] == []
    timers = zero["timers"]
    assert timers.keys() == {"fwd", "bwd", "bwd_inner", "bwd_allreduce", "step"} and min(timers.values()) >= 0
    assert timers["bwd"] == pytest.approx(timers["bwd_inner"] + timers["bwd_allreduce"]) and timers["step"] > 0
    report = (tmp_path / "flops.txt").read_text()
    # 4 samples through 8 x 16 and 16 x 1, two operations for each product.
    assert report.startswith("profile of step 2\n") and f"{2 * 4 * (8 * 16 + 16) / 1e3:.2f} KFLOPs" in report
    assert "0 (Linear): 144 parameters" in report
    assert zero["collectives"]["engine reduce_scatter"] >= STEPS and zero["speed"] != 0


def read_events(data: bytes) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value) of an event file, whose records and messages have the shape that we write."""
    while data:
        (length,) = struct.unpack_from("<Q", data)
        message, data = data[12 : 12 + length], data[16 + length :]
        fields = dict(read_message(message))
        if 5 in fields:
            value = dict(read_message(dict(read_message(fields[5]))[1]))
            yield value[1].decode(), fields[2], struct.unpack("<f", value[2])[0]


def read_message(data: bytes) -> Iterator[tuple[int, Any]]:
    def varint() -> int:
        nonlocal data
        value = shift = 0
        while True:
            byte, data = data[0], data[1:]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while data:
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if size is None else size
        content, data = data[:length], data[length:]
        yield key >> 3, content


def test_the_profile_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    flops = 2 * 3 * (8 * 16 + 16 * 4)
    assert get_model_profile(model, (3, 8), print_profile=False, as_string=False) == (flops, flops // 2, 212)
    texts = get_model_profile(model, args=[torch.ones(3, 8)], print_profile=False)
    assert texts == ("1.15 KFLOPs", "576 MACs", "212")
    assert model.training
    with pytest.raises(AssertionError, match="no input"):
        get_model_profile(model)
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_list=[torch.nn.Linear])
    model(torch.ones(3, 8))
    profiler.stop_profile()
    assert profiler.get_total_flops() == flops and profiler.get_total_duration() > 0
    assert profiler.get_total_params(as_string=True) == "212"
    profiler.end_profile()
    assert profiler.get_total_flops() == 0


def test_timers() -> None:
    timers = SynchronizedWallClockTimer()
    timers("a").start()
    assert timers("a").started_
    with pytest.raises(RuntimeError, match="this timer is running"):
        timers("a").start()
    timers("a").stop()
    assert timers.has_timer("a") and not timers.has_timer("b")
    mean = timers("a").mean()
    assert timers("a").elapsed() == pytest.approx(mean) and timers("a").elapsed() == 0
    assert timers.get_mean(["a", "b"]) == {"a": pytest.approx(mean)} and timers("a").mean() == 0
    lines: list[str] = []
    throughput = ThroughputTimer(batch_size=4, start_step=1, steps_per_output=2, logging_fn=lines.append)
    assert throughput.avg_samples_per_sec() == float("-inf")
    for _ in range(4):
        throughput.start()
        throughput.stop(global_step=True)
    assert throughput.avg_samples_per_sec() > 0
    assert len(lines) == 2 and lines[0].startswith("epoch 0, step 2: ") and lines[0].endswith(" samples/s")
