"""`deepspeed.checkpointing`: bit for bit what autograd gives without it, whatever is kept where."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import checkpointing
from harness import run_ranks


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts from a process that has not configured anything."""
    monkeypatch.setattr(checkpointing, "_configured", False)
    monkeypatch.setattr(checkpointing, "_settings", checkpointing._Settings())
    monkeypatch.setattr(checkpointing, "_mpu", None)
    yield
    checkpointing.reset()
    checkpointing.get_cuda_rng_tracker().reset()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(checkpointing, "log_dist", lambda message, **_: lines.append(message))
    return lines


class Layer(nn.Module):
    """A layer with dropout that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.calls = nn.Linear(6, 9), nn.Linear(9, 6), 0

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        y = self.down(nn.functional.dropout(torch.tanh(self.up(x)), 0.3, training=True)) * scale
        return y if shift is None else y + shift


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def passes(run: Callable[..., Any], use: Callable[..., torch.Tensor], needs_gradient: bool = True) -> Any:
    """Loss and all gradients of `use(run, layer, x)`, from one seed; and how often the layer ran."""
    torch.manual_seed(5)
    layer = Layer()
    x = torch.randn(4, 6, requires_grad=needs_gradient)
    loss = use(run, layer, x)
    loss.backward()
    return [loss, x.grad, *(p.grad for p in layer.parameters())], layer.calls, torch.rand(1)


def chain(run: Callable[..., Any], layer: Layer, x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = run(layer, x)
    return x.square().mean()


def with_arguments(run: Callable[..., Any], layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Numbers, None and strings among tensors; a keyword that torch's own function has, too."""

    def function(scale: float, note: str, x: torch.Tensor, nothing: None, index: torch.Tensor, debug: bool) -> Any:
        assert (note, nothing, debug) == ("note", None, True)
        return layer(x[index], scale)

    return run(function, 0.5, "note", x, None, torch.tensor([0, 2]), debug=True).square().mean()


def with_tensor_keyword(run: Callable[..., Any], layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return run(layer, x, shift=x * 2).square().mean()


def with_tuples(run: Callable[..., Any], layer: Layer, x: torch.Tensor) -> torch.Tensor:
    def function(pair: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> Any:
        return layer(x) + pair[0], pair[1], (7, x * 2)

    one, two, (number, three) = run(function, (x * 3, x.detach()), x)
    return (one + two * number + three).square().mean()


def with_dict(run: Callable[..., Any], layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return run(lambda x: {"y": layer(x), "note": None}, x)["y"].square().mean()


def nested(run: Callable[..., Any], layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return run(lambda x: layer(run(layer, x)), x).square().mean()


def partly_used(run: Callable[..., Any], layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return run(lambda x: (layer(x), layer(2 * x)), x)[0].square().mean()


USES = (chain, with_arguments, with_tensor_keyword, with_tuples, with_dict, nested, partly_used)


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("name", ["checkpoint", "non_reentrant_checkpoint"])
def test_gradients_are_those_of_plain_autograd(name: str, needs_gradient: bool, use: Callable[..., Any]) -> None:
    plain, calls, random = passes(call, use, needs_gradient)
    found, recomputed, random_after = passes(getattr(checkpointing, name), use, needs_gradient)
    assert same(plain, found)
    assert torch.equal(random, random_after), "recomputation has moved the random numbers"
    assert recomputed > calls, "nothing was recomputed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    def run(function: Callable[..., Any]) -> list[torch.Tensor]:
        torch.manual_seed(5)
        layer, x = Layer().to(dtype), torch.randn(4, 6, dtype=dtype, requires_grad=True)
        function(layer, x).square().mean().backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    assert same(run(call), run(checkpointing.checkpoint))


def test_without_gradients_nothing_is_kept() -> None:
    layer, x = Layer(), torch.randn(4, 6)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.manual_seed(1)
            out = checkpointing.checkpoint(layer, x)
            torch.manual_seed(1)
            assert torch.equal(out, layer(x)) and not out.requires_grad


def test_what_lies_within_is_not_kept() -> None:
    inner: list[weakref.ref[torch.Tensor]] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x)  # exp keeps its result
        inner.append(weakref.ref(y))
        return y.square()

    x = torch.randn(3, requires_grad=True)
    out = checkpointing.checkpoint(function, x)
    gc.collect()
    assert inner[0]() is None
    out.sum().backward()
    assert torch.allclose(x.grad, 2 * torch.exp(2 * x.detach()))


def test_an_error_in_the_function_comes_through() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        checkpointing.checkpoint(function, torch.ones(1, requires_grad=True))


def test_the_originals_autograd_function() -> None:
    outputs: list[Any] = []
    x = torch.randn(3, requires_grad=True)
    result = checkpointing.CheckpointFunction.apply(lambda x: (x * 2, x.sum()), outputs, x)
    assert [o is r for o, r in zip(outputs, result, strict=True)] == [True, True]
    result[0].sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


# -- configure ---------------------------------------------------------------------------------------------------------


def test_configure_says_what_it_did(config_file: Callable[..., Path]) -> None:
    assert not checkpointing.is_configured()
    checkpointing.configure(None)
    assert checkpointing.is_configured()
    block = {"activation_checkpointing": {"cpu_checkpointing": True, "number_checkpoints": 4e0, "profile": True}}
    for config in (block, config_file(block), str(config_file(block))):
        checkpointing.configure(None, deepspeed_config=config, profile=False)
        assert checkpointing._settings == checkpointing._Settings(checkpoint_in_cpu=True, num_checkpoints=4)


def test_a_typo_in_the_block_is_an_error() -> None:
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="cpu_checkpointing"):
        checkpointing.configure(None, {"activation_checkpointing": {"cpu_checkpoint": True}})


@pytest.mark.parametrize("given", [{}, {"partition_activations": True}, {"num_checkpoints": 3}])
def test_contiguous_buffers_need_shares_and_a_count(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs partition_activations and num_checkpoints"):
        checkpointing.configure(None, contiguous_checkpointing=True, **given)
    assert not checkpointing.is_configured()


def test_shares_without_a_group_are_said_to_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(checkpointing, "warning_once", said.append)
    checkpointing.configure(None, partition_activations=True)
    assert len(said) == 1 and "no model-parallel group" in said[0]
    assert same(passes(call, chain)[0], passes(checkpointing.checkpoint, chain)[0])


def test_the_time_of_each_checkpoint_is_logged(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(type(deepspeed.get_accelerator()), "synchronize", lambda *_: waits.append(None))
    checkpointing.configure(None, profile=True)
    passes(checkpointing.checkpoint, chain)
    assert [line.split()[1] for line in logged] == ["forward"] * 3 + ["recomputation"] * 3
    assert len(waits) == 12


def test_the_device_is_waited_for(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(type(deepspeed.get_accelerator()), "synchronize", lambda *_: waits.append(None))
    passes(checkpointing.checkpoint, chain)
    assert waits == []
    checkpointing.configure(None, synchronize=True)
    passes(checkpointing.checkpoint, chain)
    assert len(waits) == 12 and logged == []


def test_inputs_on_the_host_stay_where_they_are() -> None:
    checkpointing.configure(None, checkpoint_in_cpu=True)
    assert same(passes(call, chain)[0], passes(checkpointing.checkpoint, chain)[0])


def of_the_config(block: dict[str, Any], first: bool) -> tuple[bool, str]:
    if first:
        checkpointing.configure(None, synchronize=True)
    config = {"train_batch_size": 1, "activation_checkpointing": block}
    deepspeed.initialize(model=nn.Linear(2, 2), config=config)
    return checkpointing.is_configured(), str(checkpointing._settings)


def test_initialize_takes_the_block_unless_the_client_has_configured() -> None:
    block = {"profile": True}
    assert run_ranks(of_the_config, 1, block, False) == [(False, str(checkpointing._Settings(profile=True)))]
    assert run_ranks(of_the_config, 1, block, True) == [(True, str(checkpointing._Settings(synchronize=True)))]
    assert run_ranks(of_the_config, 1, {}, False) == [(False, str(checkpointing._Settings()))]


# -- model-parallel groups ---------------------------------------------------------------------------------------------


class Mpu:
    """All ranks are one model-parallel group, under the older or the newer names."""

    def __init__(self, middle: str):
        for what, get in (
            ("world_size", torch.distributed.get_world_size),
            ("rank", torch.distributed.get_rank),
            ("group", lambda: torch.distributed.group.WORLD),
        ):
            setattr(self, f"get_{middle}_{what}", get)


def in_shares(settings: dict[str, Any], middle: str) -> dict[str, Any]:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    checkpointing.configure(Mpu(middle), **settings)
    equal = [same(passes(call, use)[0], passes(checkpointing.checkpoint, use)[0]) for use in USES]
    x = torch.randn(3, 5, requires_grad=True)
    middle_value = x * 2
    watched = weakref.ref(middle_value)
    out = checkpointing.checkpoint(lambda y: y.sin().sum(), middle_value)
    del middle_value
    gc.collect()
    released = watched() is None
    out.backward()
    return {
        "equal": all(equal),
        "released": released,
        "gradient": torch.allclose(x.grad, 2 * torch.cos(2 * x.detach())),
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"partition_activations": True},
        {"partition_activations": True, "checkpoint_in_cpu": True},
        {"partition_activations": True, "contiguous_checkpointing": True, "num_checkpoints": 2},
    ],
    ids=["shares", "shares on the host", "shares in buffers"],
)
def test_model_parallel_ranks_keep_shares(settings: dict[str, Any], world: int) -> None:
    for found in run_ranks(in_shares, world, settings, "model_parallel" if world == 2 else "tensor_model_parallel"):
        assert all(found.values()), found


def buffers() -> tuple[int, int, int]:
    """Storages in which five checkpoints keep their shares, two to a buffer; what is left open; and after reset()."""
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    checkpointing.configure(
        Mpu("model_parallel"), partition_activations=True, contiguous_checkpointing=True, num_checkpoints=2
    )
    seen: set[int] = set()
    into = checkpointing._into_buffer

    def watched(share: torch.Tensor, count: int) -> torch.Tensor:
        placed = into(share, count)
        seen.add(placed.untyped_storage().data_ptr())
        return placed

    checkpointing._into_buffer = watched
    x = torch.randn(8, requires_grad=True)
    for _ in range(5):
        x = checkpointing.checkpoint(torch.sin, x)
    open_buffers = len(checkpointing._buffers)
    checkpointing.reset()
    return len(seen), open_buffers, len(checkpointing._buffers)


def test_shares_lie_in_buffers_of_the_given_count() -> None:
    assert run_ranks(buffers, 2) == [(3, 1, 0), (3, 1, 0)]


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_named_random_states() -> None:
    tracker = checkpointing.get_cuda_rng_tracker()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tracker.add("mine", 17)
    with tracker.fork("mine"):
        one = torch.rand(2)
    assert torch.equal(torch.rand(2), expected), "the device's own numbers moved"
    with tracker.fork("mine"):
        two = torch.rand(2)
    both = torch.rand(4, generator=torch.Generator().manual_seed(17))
    assert not torch.equal(one, two) and torch.equal(one, both[:2])
    for name, seed in (("mine", 18), ("other", 17)):
        with pytest.raises(ValueError, match="tracked already"):
            tracker.add(name, seed)
    with pytest.raises(KeyError, match="model_parallel_cuda_manual_seed"), tracker.fork():
        pass


def test_recomputation_replays_the_named_states() -> None:
    tracker = checkpointing.get_cuda_rng_tracker()

    def run(function: Callable[..., Any]) -> list[torch.Tensor]:
        checkpointing.model_parallel_cuda_manual_seed(21)
        x = torch.randn(50, requires_grad=True)

        def layer(x: torch.Tensor) -> torch.Tensor:
            with tracker.fork():
                return nn.functional.dropout(x, 0.5).sin()

        y = function(layer, function(layer, x))
        y.sum().backward()
        with tracker.fork():
            return [y, x.grad, torch.rand(3), torch.rand(3)]

    assert same(run(call), run(checkpointing.checkpoint))


def seeds() -> tuple[list[float], list[float], list[float]]:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    checkpointing.configure(Mpu("model_parallel"))
    checkpointing.model_parallel_cuda_manual_seed(100)
    shared = torch.rand(3).tolist()
    tracker = checkpointing.get_cuda_rng_tracker()
    with tracker.fork():
        own = torch.rand(3).tolist()
    checkpointing.model_parallel_reconfigure_tp_seed(100)
    with tracker.fork():
        return shared, own, torch.rand(3).tolist()


def test_model_parallel_ranks_draw_alike_and_apart() -> None:
    results = run_ranks(seeds, 2)
    for rank, (shared, own, again) in enumerate(results):
        assert shared == torch.rand(3, generator=torch.Generator().manual_seed(100)).tolist()
        assert own == again == torch.rand(3, generator=torch.Generator().manual_seed(100 + 2718 + rank)).tolist()
