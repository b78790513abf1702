"""What is installed: one wheel for every CPython from 3.10 on, small, that needs torch and nothing else."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from harness import run_command

MEGABYTES = 15


def test_one_wheel_serves_every_python_from_3_10_on() -> None:
    wheel = distribution("deepspeed").read_text("WHEEL") or ""
    tags = re.findall(r"^Tag: (.*)$", wheel, re.MULTILINE)
    assert tags and all(re.fullmatch(r"cp310-abi3-(many)?linux\w*", tag) for tag in tags), wheel
    assert distribution("deepspeed").metadata["Requires-Python"] == ">=3.10"


def test_it_needs_torch_and_nothing_else() -> None:
    assert distribution("deepspeed").requires == ["torch"]


def test_it_is_small_and_has_one_extension() -> None:
    files = distribution("deepspeed").files or []
    # A wheel is a zip file: it is smaller than what comes out of it.
    size = sum(file.size or 0 for file in files)
    assert 1e6 < size < MEGABYTES * 1e6, f"{size / 1e6:.1f} MB"
    assert [file.name for file in files if ".so" in file.suffixes] == ["_native.abi3.so"]
    assert {"deepspeed", "ds_report", "ds"} <= {file.name for file in files if "bin" in file.parts}


# Monitors, the profiler, a save, a resume and an export, with every module that torch does not need absent.
_TRAIN = """
import json, sys

class WithoutAbsent:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

folder, absent = sys.argv[1], set(json.loads(sys.argv[2]))
sys.meta_path[:] = [WithoutAbsent(finder) for finder in sys.meta_path]
import warnings
warnings.simplefilter("ignore")  # torch misses numpy
import torch, deepspeed

config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "tensorboard": {"enabled": True, "output_path": folder},
    "csv_monitor": {"enabled": True, "output_path": folder},
    "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": folder + "/flops.txt"},
    "comms_logger": {"enabled": True},
}

def start():
    torch.manual_seed(1)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))
    return deepspeed.initialize(model=model, config=config)[0]

def train(engine, steps):
    losses = []
    for _ in range(steps):
        loss = engine(torch.ones(2, 4, dtype=torch.bfloat16)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses

engine = start()
train(engine, 2)
engine.save_checkpoint(folder)
whole = train(engine, 2)
again = start()
again.load_checkpoint(folder)
assert train(again, 2) == whole
deepspeed.utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(folder, folder + "/model")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} & absent)))
"""


def test_it_trains_where_torch_is_all_there_is(tmp_path: Path) -> None:
    needed = requirements("deepspeed")
    absent = [module for module, owners in packages_distributions().items() if not needed & {key(o) for o in owners}]
    assert "pytest" in absent
    arguments = [str(tmp_path), json.dumps(absent)]
    done = run_command([sys.executable, "-c", _TRAIN, *arguments], env={"DS_ACCELERATOR": "cpu"}).check()
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert (tmp_path / "model/pytorch_model.bin").is_file() and (tmp_path / "flops.txt").is_file()


def requirements(name: str, found: set[str] | None = None) -> set[str]:
    """A distribution and all that it needs, extras aside."""
    found = set() if found is None else found
    found.add(key(name))
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:  # not needed on this platform
        return found
    for line in lines:
        match = re.match(r"[\w.-]+", line)
        if match and "extra ==" not in line and key(match[0]) not in found:
            requirements(match[0], found)
    return found


def key(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
