"""The model and the data of the golden recordings: small, seeded, and the same whichever engine trains them."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 61, 64, 2, 2, 32
MICRO_BATCH = 2
MODEL_SEED, DATA_SEED = 20, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Returns the mean cross entropy in nats, computed in fp32."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, inputs, targets):
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def build() -> GPT:
    torch.manual_seed(MODEL_SEED)
    return GPT()


@functools.cache
def batch(micro_step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences x -> 5 x + c modulo the vocabulary, with c one of four constants: there is something to learn."""
    generator = torch.Generator().manual_seed(DATA_SEED + 1000 * micro_step + rank)
    x = torch.randint(VOCABULARY, (MICRO_BATCH,), generator=generator)
    c = torch.randint(4, (MICRO_BATCH,), generator=generator) * 7 + 1
    sequence = [x]
    for _ in range(LENGTH):
        sequence.append((5 * sequence[-1] + c) % VOCABULARY)
    tokens = torch.stack(sequence, dim=1)
    return tokens[:, :-1], tokens[:, 1:]
