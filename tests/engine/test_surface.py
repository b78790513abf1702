"""The engine's public face: every method and attribute that scripts and libraries rely on exists and does its work."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from harness import run_ranks
from toy import build, config, micro_step, run, start, tokens


def facts() -> dict[str, Any]:
    import deepspeed

    settings = config(
        2,
        "fp16",
        accumulation=2,
        gradient_clipping=0.5,
        steps_per_print=10,
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    )
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=build(), config=settings)
    run(engine, 5)
    out: dict[str, Any] = {
        "returned": (optimizer is engine.optimizer, loader, scheduler is engine.lr_scheduler),
        "batch": (
            engine.train_batch_size(),
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
        ),
        "counters": (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps),
        "precision": (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.fp16_auto_cast()),
        "scale": (engine.loss_scale(), engine.dynamic_loss_scale(), optimizer.loss_scale, optimizer.cur_scale),
        "zero": (
            engine.zero_optimization(),
            engine.zero_optimization_stage(),
            engine.zero_optimization_partition_gradients(),
            engine.zero_optimization_partition_weights(),
        ),
        "clipping": engine.gradient_clipping(),
        "names": (engine.optimizer_name(), engine.scheduler_name(), engine.scheduler_params()),
        "print": (engine.steps_per_print(), engine.wall_clock_breakdown(), engine.memory_breakdown()),
        "optimizer": (len(engine.get_lr()), [tuple(betas) for betas in engine.get_mom()], engine.get_type()),
        "boundary": engine.is_gradient_accumulation_boundary(),
        "applied": engine.was_step_applied(),
        "ranks": (
            engine.global_rank,
            engine.world_size,
            engine.dp_world_size,
            engine.mp_world_size,
            engine.seq_dp_world_size,
            engine.get_data_parallel_rank(),
            engine.get_model_parallel_rank(),
        ),
        "config": engine.config is settings or engine.config == settings,
        "stage in config": engine.config.get("zero_optimization", {}).get("stage"),
        "device": str(engine.device),
        "types": (str(engine.get_data_types()[0]), engine.postscale_gradients(), engine.gradient_predivide_factor()),
        "tags": (engine.checkpoint_tag_validation_enabled(), engine.checkpoint_tag_validation_fail()),
        "gather": engine.zero_gather_16bit_weights_on_model_save(),
        "dump": engine.dump_state(),
        "zero settings": (
            engine.zero_reduce_bucket_size(),
            engine.zero_prefetch_bucket_size(),
            engine.zero_offload_optimizer(),
            engine.zero_use_cpu_optimizer(),
        ),
        "blocks": (
            engine.flops_profiler_enabled(),
            engine.aio_config()["queue_depth"],
            engine.use_node_local_storage(),
        ),
        "falls through": engine.token is engine.module.token,
        "parameters": [id(p) for p in engine.parameters()] == [id(p) for p in engine.module.parameters()],
        "isinstance": (isinstance(engine, deepspeed.DeepSpeedEngine), isinstance(engine, torch.nn.Module)),
        "norm": engine.get_global_grad_norm(),
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        _ = engine.nothing_like_it
    return out


def test_facts() -> None:
    (found,) = run_ranks(facts, 1)
    assert found["returned"] == (True, None, True)
    assert found["batch"] == (4, 2, 2)
    assert found["counters"] == (2, 8, 5, 0)
    assert found["precision"] == (True, False, False)
    assert found["scale"] == (256.0, True, 256.0, 256.0)
    assert found["zero"] == (True, 2, True, False)
    assert found["clipping"] == 0.5
    assert found["names"][0].lower() == "adam" and found["names"][1:] == ("WarmupLR", {"warmup_num_steps": 2})
    assert found["print"] == (10, False, False)
    assert found["optimizer"][:2] == (1, [(0.9, 0.999)])
    assert found["boundary"] is True
    assert found["applied"] is True
    assert found["ranks"] == (0, 1, 1, 1, 1, 0, 0)
    assert found["config"] and found["stage in config"] == 2
    assert found["device"] == "cpu"
    assert found["types"] == ("torch.float16", True, 1.0)
    assert found["tags"] == (True, False)
    assert found["gather"] is True
    assert found["dump"] is False
    assert found["zero settings"] == (700, 50_000_000, None, False)
    assert found["blocks"] == (False, 32, False)
    assert found["falls through"] and found["parameters"]
    assert found["isinstance"] == (True, True)
    assert 0 < found["norm"] < 1e6


ESSENTIAL = [
    "forward",
    "backward",
    "step",
    "train",
    "eval",
    "save_checkpoint",
    "load_checkpoint",
    "save_16bit_model",
    "save_fp16_model",
    "module_state_dict",
    "load_module_state_dict",
    "zero_grad",
    "is_gradient_accumulation_boundary",
    "set_gradient_accumulation_boundary",
    "no_sync",
    "get_global_grad_norm",
    "was_step_applied",
    "get_lr",
    "get_mom",
    "get_type",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "set_train_batch_size",
    "set_train_micro_batch_size",
    "get_batch_info",
    "get_wall_clock_timers",
    "coalesce_grad_reduction",
    "set_data_post_process_func",
    "collect_python_gc",
    "scale",
    "allreduce_gradients",
    "deepspeed_io",
    "compile",
    "is_compiled",
    "destroy",
    "_zero3_consolidated_16bit_state_dict",
    "_consolidated_16bit_state_dict",
    "get_data_parallel_rank",
    "zero_gather_16bit_weights_on_model_save",
]


def test_every_essential_method_exists() -> None:
    import deepspeed

    missing = [name for name in ESSENTIAL if not hasattr(deepspeed.DeepSpeedEngine, name)]
    assert missing == []
    assert "exclude_frozen_parameters" in inspect.signature(deepspeed.DeepSpeedEngine.save_checkpoint).parameters
    names = list(inspect.signature(deepspeed.initialize).parameters)
    assert names == ["args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler",
                     "distributed_port", "mpu", "dist_init_required", "collate_fn", "config", "mesh_param",
                     "config_params"]  # fmt: skip


def batch_sizes() -> tuple[Any, ...]:
    engine = start(config(1, accumulation=2))
    engine.set_train_batch_size(16)
    by_batch = (engine.train_batch_size(), engine.gradient_accumulation_steps())
    try:
        engine.set_train_batch_size(7)
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    engine.set_train_micro_batch_size(1)
    return by_batch, refused, engine.get_batch_info()


def test_batch_sizes_can_be_changed() -> None:
    by_batch, refused, after = run_ranks(batch_sizes, 2)[0]
    assert by_batch == (16, 4)
    assert "7" in refused
    assert after == (8, 1, 4)


def wrapping() -> dict[str, Any]:
    """The optimizer as accelerate and lightning treat it."""
    import deepspeed
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

    engine = start(config(2))
    optimizer = engine.optimizer

    class Wrapper:
        def __init__(self, inner: Any):
            self.__dict__.update({k: v for k, v in inner.__dict__.items() if k not in ("step", "__del__")})
            self.__class__ = type("Fabric" + inner.__class__.__name__, (self.__class__, inner.__class__), {})
            self._inner = inner

    wrapped = Wrapper(optimizer)
    return {
        "type": type(wrapped).__name__,
        "isinstance": (
            isinstance(optimizer, DeepSpeedOptimizer),
            isinstance(wrapped, DeepSpeedOptimizer),
            isinstance(optimizer, deepspeed.DeepSpeedOptimizer),
        ),
        "groups": wrapped.param_groups is optimizer.param_groups,
        "overflow": optimizer.overflow,
        "inner": hasattr(optimizer, "optimizer"),
        "state": dict(optimizer.state.items()) is not None,
        "rates": (optimizer.get_lr(), optimizer.set_lr(0.5), engine.get_lr()),
    }


def test_an_optimizer_can_be_wrapped() -> None:
    (found,) = run_ranks(wrapping, 1)
    assert found["type"].startswith("Fabric")
    assert found["isinstance"] == (True, True, True)
    assert found["groups"] and found["inner"] and found["state"]
    assert found["overflow"] is False
    assert found["rates"] == (1e-2, None, [0.5])


def subclassed() -> tuple[int, bool]:
    import deepspeed

    class Engine(deepspeed.DeepSpeedEngine):
        steps_seen = 0

        def step(self, *args: Any, **kwargs: Any) -> None:
            self.steps_seen += 1
            super().step(*args, **kwargs)

    deepspeed.init_distributed(verbose=False)
    engine = Engine(args=None, model=build(), config=config(1))
    run(engine, 2)
    return engine.steps_seen, isinstance(engine, deepspeed.DeepSpeedEngine)


def test_the_engine_can_be_subclassed() -> None:
    assert run_ranks(subclassed, 1) == [(2, True)]


def loaders() -> tuple[Any, ...]:
    import deepspeed

    torch.manual_seed(0)
    both = [(torch.randint(29, (7,)), torch.tensor(index)) for index in range(12)]

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(29, 2)

        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            self.seen = index.tolist()
            return self.table(x).square().mean()

    engine, _, loader, _ = deepspeed.initialize(model=Module(), training_data=both, config=config(1))
    loader = engine.deepspeed_io(both, num_local_io_workers=0)
    seen = []
    for batch in loader:
        engine.backward(engine(*batch))
        engine.step()
        seen += engine.module.seen
    collated = engine.deepspeed_io(
        both,
        batch_size=3,
        route="eval",
        num_local_io_workers=0,
        collate_fn=lambda samples: [index.item() for _, index in samples],
    )
    return engine.training_dataloader is not None, len(loader), seen, list(collated)


def test_training_data_becomes_a_loader() -> None:
    found = run_ranks(loaders, 2)
    assert all(result[0] for result in found)
    assert [result[1] for result in found] == [3, 3]
    assert sorted(found[0][2] + found[1][2]) == list(range(12))
    assert [result[3] for result in found] == [[[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9, 11]]]


def without_optimizer() -> tuple[Any, ...]:
    """An engine without optimizer: for evaluation, or for a client that steps by itself."""
    import deepspeed

    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=build(), model_parameters=[], optimizer=None, config=config(0, optimizer=None)
    )
    engine.eval()
    with torch.no_grad():
        loss = engine(*tokens(0, 0)).item()
    return optimizer, scheduler, engine.get_lr(), loss > 0


def test_an_engine_without_optimizer() -> None:
    assert run_ranks(without_optimizer, 2) == [(None, None, [], True)] * 2


def zero_grad() -> bool:
    engine = start(config(1, accumulation=2, optimizer={"type": "SGD", "params": {"lr": 0.1}}))
    before = {name: p.clone() for name, p in engine.module.named_parameters()}
    engine.backward(engine(*tokens(0, 0)))
    engine.step()
    engine.zero_grad()
    engine.backward(engine(*tokens(1, 0)) * 0)
    engine.step()
    return all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())


def test_zero_grad_forgets_what_was_accumulated() -> None:
    assert run_ranks(zero_grad, 2) == [True, True]


def returned_loss() -> tuple[float, float, float]:
    engine = start(config(2, "fp16", accumulation=4))
    loss = engine(*tokens(0, 0))
    divided = engine.backward(loss, scale_wrt_gas=True)
    engine.step()
    again = engine(*tokens(0, 0))
    return loss.item(), divided.item(), engine.backward(again, scale_wrt_gas=False).item()


def test_backward_returns_the_loss_divided_by_the_accumulation_steps() -> None:
    for loss, divided, whole in run_ranks(returned_loss, 1):
        assert divided == pytest.approx(loss / 4)
        assert whole == pytest.approx(loss)


def scaler() -> tuple[list[float], list[int], float]:
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1, "min_loss_scale": 1}
    engine = start(config(1, "fp16", fp16=fp16))
    scales, skipped = [], []
    for index in range(6):
        loss = engine(*tokens(index, engine.global_rank))
        engine.backward(loss * (float("inf") if index == 2 else 1.0))
        engine.step()
        scales.append(engine.loss_scale())
        skipped.append(engine.skipped_steps)
    engine.optimizer.override_loss_scale(64.0)
    micro_step(engine, 5)
    return scales, skipped, engine.loss_scale()


def test_the_loss_scale_adapts() -> None:
    for scales, skipped, fixed in run_ranks(scaler, 2):
        # The third clean step since the start, or since the last overflow, doubles it.
        assert scales == [16.0, 16.0, 8.0, 8.0, 8.0, 16.0]
        assert skipped == [0, 0, 1, 1, 1, 1]
        assert fixed == 64.0


def refused_client() -> tuple[str, str]:
    class Mine(torch.optim.SGD):
        pass

    def attempt(**more: Any) -> str:
        model = build()
        optimizer = Mine([p for p in model.parameters() if p.requires_grad], lr=0.1)
        try:
            run(start(config(1, optimizer=None, **more), model, optimizer=optimizer), 1)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return attempt(), attempt(zero_allow_untested_optimizer=True)


def test_an_untested_client_optimizer_is_sharded_only_when_asked() -> None:
    for refused, allowed in run_ranks(refused_client, 1):
        assert "zero_allow_untested_optimizer" in refused and "Mine" in refused
        assert allowed == ""


def step_lines(capture: str) -> None:
    engine = start(config(1, steps_per_print=2))
    run(engine, 4)
    print("done", flush=True)


def test_step_lines_come_every_so_often(ranks: Any, outcomes: Any) -> None:
    first, second = outcomes(step_lines, 2, "")
    lines = [line for line in first.output.splitlines() if "loss" in line and "norm" in line]
    assert len(lines) == 2, first.output
    assert not [line for line in second.output.splitlines() if "norm" in line]


def compiled() -> tuple[bool, bool, bool, bool]:
    engine = start(config(2))
    before = engine.is_compiled
    engine.compile(backend="eager")
    plain = start(config(2))
    return before, engine.is_compiled, plain.is_compiled, run(engine, 3) == run(plain, 3)


def test_the_module_can_be_compiled() -> None:
    assert run_ranks(compiled, 1, deadline=120) == [(False, True, False, True)]


def shared_mappings() -> tuple[int, int, int]:
    import gc

    def count() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:" in line for line in maps)

    before = count()
    engine = start(config(2))
    run(engine, 2)
    during = count()
    engine.destroy()
    del engine
    gc.collect()
    return before, during, count()


def test_destroy_gives_the_shared_memory_back() -> None:
    for before, during, after in run_ranks(shared_mappings, 2):
        assert before == after == 0 < during


class Failing(torch.autograd.Function):
    """Raises in its backward pass when told to."""

    fail = True

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if Failing.fail:
            raise ArithmeticError("on purpose")
        return gradient


def backward_fails_once() -> tuple[bool, str]:
    """A batch whose backward pass raises is left out; what comes after is as if it had never been."""
    import toy

    def make() -> Any:
        model = build()
        plain = model.norm.forward
        model.norm.forward = lambda x: Failing.apply(plain(x))
        return start(config(2, "fp16"), model)

    engine = make()
    try:
        engine.scale(engine(*tokens(0, engine.global_rank))).backward()
        raised = ""
    except ArithmeticError as error:
        raised = str(error)
    engine.zero_grad()
    Failing.fail = False
    other = make()
    for each in (engine, other):
        for index in range(1, 4):
            each.scale(each(*tokens(index, each.global_rank))).backward()
            each.step()
    return toy.digest(engine.module) == toy.digest(other.module), raised


def test_a_batch_may_be_left_out_after_its_backward_failed() -> None:
    assert run_ranks(backward_fails_once, 2) == [(True, "on purpose")] * 2
