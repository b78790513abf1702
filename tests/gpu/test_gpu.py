"""One GPU: every stage, precision and offload trains there, and gives the CPU's losses but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from harness import run_ranks as run_on_cpu
from models import CASES, build
from variants import BLOCKS, DTYPES, config, start, values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

DEVICE = "cuda:0"
STEPS = 6
PRECISIONS = ("fp32", "bf16", "fp16")
# Relative differences of losses to those on the CPU: reductions in other orders, amplified by six updates.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
STAGES = ("0", "1", "2", "3", "3 defaults")
OFFLOADED = (
    "2 optimizer on cpu",
    "3 optimizer on cpu",
    "3 half of the optimizer on cpu",
    "3 all on cpu",
    "3 optimizer on nvme",
    "3 all on nvme",
)
# Only the weights wait elsewhere; the device updates them.
WEIGHTS_AWAY = ("3 weights on cpu", "3 weights on nvme")
MODELS = ("lstm", "tied and frozen", "experts", "convolutions", "reused", "returns dict")


def run_ranks(function: Callable[..., Any], world: int, *args: Any, **options: Any) -> list[Any]:
    """On ranks whose accelerator is the GPU."""
    return run_on_cpu(function, world, *args, **options | {"env": {"DS_ACCELERATOR": "cuda", **options.get("env", {})}})


@contextmanager
def accelerator_for(device: str) -> Iterator[None]:
    """A model on the CPU stays there only where there is no other accelerator."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    before = get_accelerator()
    if device == "cpu":
        set_accelerator(CPU_Accelerator())
    yield
    set_accelerator(before)


def on_the_gpu(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(DEVICE)
    if isinstance(batch, dict):
        return {key: on_the_gpu(value) for key, value in batch.items()}
    return type(batch)(on_the_gpu(value) for value in batch) if isinstance(batch, (list, tuple)) else batch


def train(case: str, variant: str, precision: str, device: str, folder: str = "", steps: int = STEPS) -> dict[str, Any]:
    """Losses, norms, final weights, and where weights lay while the model ran."""
    # Matrix products in full fp32, as on the CPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    made = CASES[case]
    with accelerator_for(device):
        engine = start(config(variant, precision, folder), build(made).to(device))
    seen: set[str] = set()
    watched = next(m for m in engine.module.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))
    watched.register_forward_pre_hook(lambda module, _: seen.add(str(module.weight.device)))
    losses, norms = [], []
    for index in range(steps):
        arguments, keywords = made.batch(engine.global_rank, index, DTYPES[precision])
        if device != "cpu":
            arguments, keywords = on_the_gpu(arguments), on_the_gpu(keywords)
        loss = made.loss(engine(*arguments, **keywords))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    out = {
        "losses": losses,
        "norms": norms,
        "weights": values(engine.module).cpu(),
        "where": seen,
        "engine": str(engine.device),
        "skipped": engine.skipped_steps,
    }
    engine.destroy()
    return out


def on_both(case: str, variant: str, precision: str, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(case, variant, precision, DEVICE, folder), train(case, "0", precision, "cpu")


def assert_close(gpu: dict[str, Any], cpu: dict[str, Any], precision: str) -> None:
    assert gpu["where"] == {DEVICE} and gpu["engine"] == DEVICE
    assert gpu["skipped"] == cpu["skipped"] == 0
    tolerance = TOLERANCES[precision]
    for what in ("losses", "norms"):
        for step, (found, expected) in enumerate(zip(gpu[what], cpu[what], strict=True)):
            assert abs(found - expected) <= tolerance * max(abs(expected), 0.1), f"{what}, step {step}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", STAGES + OFFLOADED + WEIGHTS_AWAY)
def test_every_stage_trains_on_the_gpu(variant: str, precision: str, tmp_path: Any) -> None:
    ((gpu, cpu),) = run_ranks(on_both, 1, "gpt", variant, precision, str(tmp_path), deadline=180)
    assert_close(gpu, cpu, precision)


@pytest.mark.parametrize("variant", ["2", "3", "3 all on cpu"])
@pytest.mark.parametrize("case", MODELS)
def test_every_model_trains_on_the_gpu(case: str, variant: str, tmp_path: Any) -> None:
    ((gpu, cpu),) = run_ranks(on_both, 1, case, variant, "fp32", str(tmp_path), deadline=180)
    assert_close(gpu, cpu, "fp32")


def two_ranks(variant: str, precision: str, folder: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return torch.distributed.get_backend(), *on_both("gpt", variant, precision, folder)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", STAGES + OFFLOADED)
def test_two_gloo_ranks_share_one_gpu(variant: str, precision: str, tmp_path: Any) -> None:
    results = run_ranks(two_ranks, 2, variant, precision, str(tmp_path), deadline=180)
    for backend, gpu, cpu in results:
        assert "gloo" in backend
        assert_close(gpu, cpu, precision)
    (_, one, _), (_, other, _) = results
    assert torch.equal(one["weights"], other["weights"])
    assert one["norms"] == other["norms"]


def all_stages(precision: str, folder: str) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    variants = STAGES + OFFLOADED + WEIGHTS_AWAY
    return {variant: train("tied and frozen", variant, precision, DEVICE, folder) for variant in variants}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stages_agree_on_the_gpu(precision: str, tmp_path: Any) -> None:
    """The same kernels on the same numbers: bits are equal but where an offloaded update runs on the host."""
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    (found,) = run_ranks(all_stages, 1, precision, str(tmp_path), deadline=240, env=env)
    reference = found["0"]
    for variant in STAGES[1:] + WEIGHTS_AWAY:
        assert found[variant]["losses"] == reference["losses"], variant
        assert torch.equal(found[variant]["weights"], reference["weights"]), variant
    for variant in OFFLOADED:
        assert_close(found[variant], {**reference, "where": set()}, precision)


def resumed(variant: str, folder: str) -> tuple[str, str, bool]:
    made = CASES["gpt"]

    def run(engine: Any, first: int) -> None:
        for index in range(first, first + 3):
            engine.backward(engine(*on_the_gpu(made.batch(engine.global_rank, index, torch.float32)[0])))
            engine.step()

    engine = start(config(variant, folder=folder), build(made).to(DEVICE))
    run(engine, 0)
    engine.save_checkpoint(folder, "w")
    run(engine, 3)
    through = digest_on_host(engine.module)
    engine.destroy()
    other = start(config(variant, folder=folder), build(made, seed=99).to(DEVICE))
    other.load_checkpoint(folder, "w")
    run(other, 3)
    again = digest_on_host(other.module)
    other.destroy()
    with accelerator_for("cpu"):
        host = start(config("2"), build(made, seed=98))
    host.load_checkpoint(folder, "w")
    return through, again, host.global_steps == 3


def digest_on_host(module: torch.nn.Module) -> str:
    return str(values(module).cpu().tolist())


@pytest.mark.parametrize("variant", ["1", "3", "3 all on cpu", "3 weights on nvme", "3 half of the optimizer on cpu"])
def test_a_checkpoint_of_the_gpu_resumes_there_and_on_the_cpu(variant: str, tmp_path: Any) -> None:
    for through, again, on_host in run_ranks(resumed, 1, variant, str(tmp_path), deadline=180):
        assert through == again and on_host


def peaks(variant: str) -> int:
    """Bytes that torch had allocated on the GPU at most, beyond those before initialize, for 8 M parameters in bf16."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(8))).to(DEVICE)
    before = torch.cuda.memory_allocated()
    engine = start(config(variant, "bf16"), model)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 1024, device=DEVICE, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    return torch.cuda.max_memory_allocated() - before


def test_offload_takes_the_optimizer_state_off_the_gpu() -> None:
    parameters = 8 * 1024 * 1024
    kept, offloaded = (run_ranks(peaks, 1, variant, deadline=120)[0] for variant in ("2", "2 optimizer on cpu"))
    # fp32 masters and two moments: 12 bytes a parameter.
    assert kept - offloaded > 10 * parameters


def mismatched() -> str:
    try:
        start(config("2"), torch.nn.Sequential(torch.nn.Linear(2, 2).to(DEVICE), torch.nn.Linear(2, 2)))
    except Exception as error:
        return str(error)
    return ""


def test_a_model_on_two_devices_is_refused_by_name() -> None:
    (error,) = run_ranks(mismatched, 1)
    assert "1." in error and "cpu" in error and "cuda" in error


def moved_by_the_engine(variant: str) -> tuple[str, set[str], float]:
    made = CASES["gpt"]
    engine = start(config(variant), build(made))
    loss = engine(*on_the_gpu(made.batch(0, 0, torch.float32)[0]))
    engine.backward(loss)
    engine.step()
    return str(engine.device), {str(b.device) for b in engine.module.buffers()} | {str(loss.device)}, loss.item()


@pytest.mark.parametrize("variant", ["2", "3"])
def test_a_model_on_the_host_is_taken_to_the_gpu(variant: str) -> None:
    ((device, seen, loss),) = run_ranks(moved_by_the_engine, 1, variant, deadline=120)
    assert device == DEVICE and seen == {DEVICE} and loss > 0


def inputs_on_the_host(precision: str) -> dict[str, Any]:
    """deepspeed.checkpointing with cpu_checkpointing: the kept inputs leave the GPU, and come back for backward."""
    from deepspeed import checkpointing

    def run(in_cpu: bool) -> tuple[list[torch.Tensor], int]:
        checkpointing.configure(None, checkpoint_in_cpu=in_cpu, synchronize=True)
        torch.manual_seed(1)
        layers = [torch.nn.Linear(512, 512, device=DEVICE, dtype=DTYPES[precision]) for _ in range(4)]
        x = torch.randn(2048, 512, device=DEVICE, dtype=DTYPES[precision], requires_grad=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = x
        for layer in layers:
            y = checkpointing.checkpoint(lambda y, layer=layer: torch.nn.functional.dropout(layer(y)).tanh(), y)
        held = torch.cuda.memory_allocated() - before
        y.float().square().sum().backward()
        return [x.grad, *(layer.weight.grad for layer in layers)], held

    (plain, kept), (found, left) = run(False), run(True)
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)),
        "moved": kept - left >= 2 * 2048 * 512 * plain[0].element_size(),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpointed_inputs_are_kept_on_the_host(precision: str) -> None:
    (found,) = run_ranks(inputs_on_the_host, 1, precision, deadline=120)
    assert all(found.values()), found


def test_the_variants_are_those_of_the_cpu_tests() -> None:
    assert set(STAGES + OFFLOADED + WEIGHTS_AWAY) <= set(BLOCKS)
