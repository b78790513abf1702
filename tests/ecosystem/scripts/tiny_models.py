"""Tiny models of five families, made from configs, and data that they can learn: no network, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    ViTConfig,
)

VOCABULARY, LENGTH, CLASSES = 64, 12, 4

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1,
    ),
    "bert": lambda: BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES,
    ),
    "vit": lambda: ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES,
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip
CLASS_OF: dict[str, Any] = {
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
    "t5": AutoModelForSeq2SeqLM,
}


def build(family: str, dropout: float = 0.0) -> PreTrainedModel:
    """A model with random weights."""
    config = CONFIGS[family]()
    for name in ("resid_pdrop", "hidden_dropout_prob", "dropout_rate", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    return CLASS_OF[family].from_config(config)


def fill(model: torch.nn.Module) -> None:
    """Gives matrices random values, also of a model that is sharded as it is made: the original forgets there what
    initialisation writes outside of GatheredParameters."""
    import deepspeed

    random = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if parameter.dim() > 1:
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=random))


class Examples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`size` examples for a family; the same ones for the same seed."""

    def __init__(self, family: str, size: int, seed: int = 0):
        self.family, self.size, self.seed = family, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(1000 * self.seed + index)
        label = torch.randint(CLASSES, (), generator=random)
        if self.family == "vit":
            noise = torch.randn(1, 16, 16, generator=random)
            return {"pixel_values": noise + label, "labels": label}
        first = torch.randint(2, VOCABULARY, (), generator=random)
        tokens = (first + torch.arange(LENGTH) * (label + 1)) % (VOCABULARY - 2) + 2
        if self.family == "bert":
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": label}
        if self.family == "t5":
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.flip(0)}
        return {"input_ids": tokens, "labels": tokens.clone()}
