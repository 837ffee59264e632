"""A plain GPT-2, which the network is compared with. tests/kernels/test_eager.py holds its ops against formulas."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.ops import EAGER
from model.gpt import GPTConfig


class PlainAttention(nn.Module):
    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        return self.c_proj(EAGER.attention(self.c_attn(x), self.n_head))


class PlainMLP(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(EAGER.gelu(self.c_fc(x)))


class PlainBlock(nn.Module):
    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(C), PlainAttention(C, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(C), PlainMLP(C)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT2(nn.Module):
    """As nanoGPT has it: each module is called by itself."""

    def __init__(self, weights: dict[str, torch.Tensor], config: GPTConfig):
        super().__init__()
        C, V = config.n_embd, config.vocab_size
        embeddings = {"wte": nn.Embedding(V, C), "wpe": nn.Embedding(config.block_size, C)}
        blocks = nn.ModuleList(PlainBlock(C, config.n_head) for _ in range(config.n_layer))
        self.transformer: Any = nn.ModuleDict({**embeddings, "h": blocks, "ln_f": nn.LayerNorm(C)})
        self.lm_head = nn.Linear(C, V, bias=False)
        self.lm_head.weight = embeddings["wte"].weight
        self.load_state_dict(weights)

    def forward(self, idx, targets, return_logits=True):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (logits if return_logits else None), loss
