"""`import deepspeed` changes nothing and every public name is there."""

from __future__ import annotations

import importlib
import json
import os
import sys

import pytest
import torch

import deepspeed
from deepspeed._features import FeatureNotBuiltError
from harness import run_command

_WATCH_AN_IMPORT = """
import json, logging, os, sys, threading, torch
before = dict(os.environ), list(logging.root.handlers), logging.root.level, threading.active_count()
import deepspeed
for name in ("comm", "accelerator", "ops", "runtime", "utils", "zero", "get_accelerator", "init_distributed"):
    getattr(deepspeed, name)
deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES, deepspeed.runtime.config, deepspeed.runtime.dataloader
after = dict(os.environ), list(logging.root.handlers), logging.root.level, threading.active_count()
print(json.dumps([before[0] == after[0], before[1:] == after[1:], torch.cuda.is_initialized(),
                  len(os.listdir("/proc/self/task")), torch.distributed.is_initialized()]))
"""


def test_importing_has_no_side_effects() -> None:
    done = run_command([sys.executable, "-c", _WATCH_AN_IMPORT], env={"OMP_NUM_THREADS": "1"}).check()
    assert json.loads(done.stdout) == [True, True, False, 1, False]
    assert done.stderr == ""


def test_importing_the_package_imports_next_to_nothing() -> None:
    # What costs time is imported on first use, torch included.
    program = "import sys; before = set(sys.modules); import deepspeed; print(*sorted(set(sys.modules) - before))"
    done = run_command([sys.executable, "-c", program]).check()
    ours = [name for name in done.stdout.split() if name.startswith("deepspeed")]
    assert ours == ["deepspeed", "deepspeed._lazy"] and "torch" not in done.stdout.split()


_FORK_AFTER_IMPORT = """
import os, sys, torch, deepspeed
deepspeed.initialize, deepspeed.DeepSpeedEngine, deepspeed.zero.Init, deepspeed.comm, deepspeed.ops.adam.FusedAdam
child = os.fork()
model = torch.nn.Linear(4, 1)
engine, *_ = deepspeed.initialize(
    model=model, config={"train_batch_size": 2, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}
)
for _ in range(2):
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()
assert engine.global_steps == 2
if child == 0:
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_has_imported_it_can_fork() -> None:
    done = run_command([sys.executable, "-c", _FORK_AFTER_IMPORT], env={"DS_ACCELERATOR": "cpu"}).check()
    assert done.stdout.splitlines()[-1] == "7"


def test_the_launcher_modules_do_not_import_torch() -> None:
    program = "import sys, deepspeed.launcher.runner as r; print('torch' in sys.modules, r.DEEPSPEED_ENVIRONMENT_NAME)"
    done = run_command([sys.executable, "-c", program], env={"DS_ENV_FILE": ""}).check()
    assert done.stdout.split() == ["False", ".deepspeed_env"]


@pytest.mark.parametrize(
    "name",
    [
        "DeepSpeedConfig",
        "DeepSpeedConfigError",
        "DeepSpeedHybridEngine",
        "DeepSpeedOptimizer",
        "DeepSpeedOptimizerCallable",
        "DeepSpeedSchedulerCallable",
        "DeepSpeedTransformerConfig",
        "DeepSpeedTransformerLayer",
        "InferenceEngine",
        "OnDevice",
        "PipelineEngine",
        "PipelineModule",
        "add_config_arguments",
        "checkpointing.configure",
        "checkpoint.utils.clone_tensors_for_torch_save",
        "comm.all_reduce",
        "default_inference_config",
        "dist.all_reduce",
        "get_accelerator",
        "init_distributed",
        "init_inference",
        "log_dist",
        "logger.setLevel",
        "module_inject.replace_transformer_layer",
        "ops.adam.DeepSpeedCPUAdam",
        "ops.adam.FusedAdam",
        "ops.adagrad.DeepSpeedCPUAdagrad",
        "ops.lamb.FusedLamb",
        "ops.lion.DeepSpeedCPULion",
        "ops.lion.FusedLion",
        "replace_transformer_layer",
        "runtime.base_optimizer.DeepSpeedOptimizer",
        "runtime.lr_schedules.VALID_LR_SCHEDULES",
        "runtime.zero.partition_parameters.ZeroParamStatus",
        "set_autotp_mode",
        "tp_model_init",
        "utils.RepeatingLoader",
        "utils.fragment_address",
        "utils.groups._get_data_parallel_group",
        "utils.logger.setLevel",
        "utils.logging.logger",
        "utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint",
        "zero.GatheredParameters",
        "zero.Init",
        "zero.register_external_parameter",
        "__version__",
        "__version_major__",
    ],
)
def test_a_public_name_is_reached_from_the_package(name: str) -> None:
    value: object = deepspeed
    for part in name.split("."):
        value = getattr(value, part)
    assert name.split(".")[0] in dir(deepspeed)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'deepspeed' has no attribute 'initialise'"):
        deepspeed.initialise  # noqa: B018


def test_what_is_not_built_says_so_on_use() -> None:
    for use, feature in [
        (lambda: deepspeed.init_inference(torch.nn.Linear(1, 1)), "the inference engine"),
        (lambda: deepspeed.PipelineModule([], num_stages=2), "pipeline parallelism"),
        (lambda: deepspeed.zero.Init(zero_quantized_weights=True), "ZeRO\\+\\+"),
        (lambda: deepspeed.utils.groups._get_expert_parallel_group(), "mixture of experts"),
    ]:
        with pytest.raises(FeatureNotBuiltError, match=feature) as raised:
            use()
        assert "docs/migration.md" in str(raised.value)
    assert not isinstance(torch.nn.Linear(1, 1), deepspeed.PipelineModule)


@pytest.mark.parametrize(
    "name",
    [
        "autotuning",
        "compression.compress",
        "linear",
        "moe.layer",
        "ops.op_builder",
        "ops.transformer",
        "runtime.data_pipeline.data_sampling",
        "runtime.hybrid_engine",
        "runtime.pipe.topology",
        "runtime.sequence_parallel.ulysses_sp",
        "runtime.tensor_parallel",
        "sequence.layer",
    ],
)
def test_a_module_that_is_not_built_says_so_on_import(name: str) -> None:
    # Programs that can do without one expect an ImportError.
    with pytest.raises(ImportError, match=r"which this version of deepspeed does not have; docs/migration\.md"):
        importlib.import_module(f"deepspeed.{name}")


def test_a_model_is_built_without_memory() -> None:
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = torch.nn.Linear(1 << 20, 1 << 20)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16
    with deepspeed.OnDevice(dtype=torch.half, enabled=False):
        assert not torch.nn.Linear(2, 2).weight.is_meta
    assert torch.get_default_dtype() == torch.float32 and not torch.empty(1).is_meta


def test_zero_contexts_leave_whole_parameters_alone() -> None:
    with deepspeed.zero.Init(enabled=False):
        layer = torch.nn.Linear(2, 2)
    with deepspeed.zero.GatheredParameters(layer.parameters(), modifier_rank=0):
        layer.weight.data.zero_()
    with deepspeed.zero.GatheredParameters(layer.weight):
        assert layer.weight.abs().sum() == 0


def test_config_arguments() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    assert deepspeed.add_config_arguments(parser) is parser
    given = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert (given.deepspeed, given.deepspeed_config) == (True, "ds.json")
    given = parser.parse_args([])
    assert (given.deepspeed, given.deepspeed_config, given.deepscale_config) == (False, None, None)


def test_version_satisfies_clients() -> None:
    version = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    assert version >= (0, 20, 0)
    assert deepspeed.__version__ == ".".join(map(str, version))
    assert os.path.exists(os.path.join(os.path.dirname(deepspeed.__file__), "py.typed"))
