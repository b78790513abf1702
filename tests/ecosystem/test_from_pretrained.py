"""`from_pretrained` at ZeRO stage 3 from safetensors: no rank has the whole model in memory of its own at any time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "scripts"), str(HERE.parent / "stage3")]

from harness import run_ranks  # noqa: E402
from library_cases import PRELOAD  # noqa: E402
from resident import MIB, Watch, anonymous  # noqa: E402

WORLD = 2
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def make(folder: str, layers: int) -> int:
    """Saves a Llama as files of at most 8 MB; its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="8MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load(small: str, large: str, backend: str | None) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    kept = HfDeepSpeedConfig(CONFIG)
    # What the libraries, the process group and the first model of all take is not the model's.
    AutoModelForCausalLM.from_pretrained(small)
    before = anonymous()
    with Watch(anonymous) as watch:
        model = AutoModelForCausalLM.from_pretrained(large)
    after = anonymous() - before
    held = sum(
        s.nbytes() for s in {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}.values()
    )
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("layers.2.mlp.up_proj.weight"))
    with deepspeed.zero.GatheredParameters(parameter):
        values = parameter.detach().clone()
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    tokens = torch.arange(8).unsqueeze(0) + deepspeed.comm.get_rank()
    losses = []
    for _ in range(2):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    del kept
    return {
        "peak": watch.peak - before,
        "after": after,
        "storage": held,
        "name": name,
        "values": values,
        "losses": losses,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int]:
    folder = tmp_path_factory.mktemp("models")
    small, large = str(folder / "small"), str(folder / "large")
    (size,) = run_ranks(make_both, 1, small, large, preload=PRELOAD, deadline=120)
    return small, large, size


def make_both(small: str, large: str) -> int:
    make(small, 1)
    return make(large, 5)


@pytest.mark.parametrize("backend", [None, "cpu:gloo"], ids=["shared", "gathered"])
def test_no_rank_holds_the_whole_model(backend: str | None, saved: tuple[str, str, int]) -> None:
    small, large, size = saved
    assert size > 40 * MIB and len(list(Path(large).glob("*.safetensors"))) > 4
    found = run_ranks(load, WORLD, small, large, backend, preload=PRELOAD, deadline=240)
    # Ranks of one host have one copy, which is none's own; elsewhere each has its part.
    part = 0 if backend is None else size / WORLD
    for rank, had in enumerate(found):
        assert had["peak"] < part + size / 4, f"rank {rank}: {had['peak'] / MIB:.0f} of {size / MIB:.0f} MiB"
        assert had["losses"][1] < had["losses"][0]
        assert torch.equal(had["values"], weight(large, had["name"]))


def weight(folder: str, name: str) -> torch.Tensor:
    """As the files have it."""
    from safetensors import safe_open

    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (it is no dict)
                return file.get_tensor(name)
    raise AssertionError(f"{name} is in no file of {folder}")
