"""accelerate's own DeepSpeed scripts, the files that it installs, not a line of them changed: a config and a script are all
there is. They check themselves: learning rates, what a state that is loaded has, that weights are saved."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

accelerate = pytest.importorskip("accelerate")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "scripts")]

from harness import run_ranks  # noqa: E402
from library_cases import PRELOAD, ds_config  # noqa: E402

SCRIPTS = Path(accelerate.__file__).parent / "test_utils/scripts/external_deps"


def run(folder: str, script: str, arguments: list[str]) -> None:
    """`accelerate launch` has set the environment; this is one of its processes."""
    import torch

    torch.set_num_threads(1)
    sys.path[:0] = [str(HERE / "standins")]
    os.chdir(folder)
    path = str(SCRIPTS / script)
    sys.argv = [path, "--model_name_or_path=bert", "--output_dir=out", *arguments]
    runpy.run_path(path, run_name="__main__")


def make(folder: str) -> None:
    """A tiny BERT with its tokenizer, as a folder that from_pretrained reads."""
    sys.path[:0] = [str(HERE / "standins")]
    from datasets import WORDS
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bert"
    run_ranks(make, 1, str(folder), preload=PRELOAD)
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "bert").symlink_to(model)
    (tmp_path / "out").mkdir()
    return tmp_path


def launched(folder: Path, config: dict[str, Any] | None = None, **plugin: object) -> dict[str, str]:
    """What `accelerate launch --use_deepspeed` puts into the environment, for a config file or flags of its own."""
    found = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no", "DS_ACCELERATOR": "cpu"}
    found |= {f"ACCELERATE_DEEPSPEED_{name.upper()}": str(value).lower() for name, value in plugin.items()}
    if config is not None:
        (folder / "ds_config.json").write_text(json.dumps(config))
        found["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "ds_config.json"
        # With a config file accelerate takes precision from there.
        del found["ACCELERATE_MIXED_PRECISION"]
        found["ACCELERATE_CONFIG_DS_FIELDS"] = "deepspeed_config_file,zero3_init_flag"
    return found


ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True}}
DECAY = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto",
    },
}  # fmt: skip
CPU = {"device": "cpu", "pin_memory": True}
PRECISION = {"fp16": {"enabled": False}, "bf16": {"enabled": True}, "gradient_accumulation_steps": 1}


def test_the_performance_script_with_flags(folder: Path) -> None:
    env = launched(folder, zero_stage=3, zero3_init=True, zero3_save_16bit_model=True)
    env["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"
    run_ranks(run, 2, str(folder), "test_performance.py", ["--num_epochs=2"], env=env, preload=PRELOAD)
    assert json.loads((folder / "out/all_results.json").read_text()).keys() == {"epoch-0", "epoch-1"}


def test_the_performance_script_with_a_config_file(folder: Path) -> None:
    config = ds_config(3, ADAMW, DECAY, zero={"offload_optimizer": CPU, "offload_param": CPU}, **PRECISION)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = "auto"
    env = launched(folder, config, zero3_init=True, zero3_save_16bit_model=True)
    run_ranks(run, 2, str(folder), "test_performance.py", ["--num_epochs=1"], env=env, preload=PRELOAD)
    assert (folder / "out/model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["zero2-with-optimizer", "zero3-model-only"])
def test_the_checkpointing_script(kind: str, folder: Path) -> None:
    config = ds_config(2, ADAMW, DECAY, **PRECISION) if "optimizer" in kind else ds_config(3, None, None, **PRECISION)
    env = launched(folder, config, zero3_init=True)
    script, epochs = "test_checkpointing.py", "--num_epochs=2"
    run_ranks(run, 2, str(folder), script, [epochs, "--partial_train_epoch=1"], env=env, preload=PRELOAD)
    resume = "--resume_from_checkpoint=out/epoch_0"
    run_ranks(run, 2, str(folder), script, [epochs, resume], env=env, preload=PRELOAD)
