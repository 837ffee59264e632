"""The learning rate against a table, and which tensors decay."""

import numpy as np
import pytest
import torch

from model.gpt import GPT, GPTConfig
from training import optim
from training.config import Config


def schedule(steps, *, N, warmup=0, frac=1.0, lr=1.0):
    config = Config(learning_rate=lr, num_iterations=N, warmup_iters=warmup, learning_rate_decay_frac=frac)
    return [optim.learning_rate(step, config) for step in steps]


HALF_WAY_DOWN_TO_A_TENTH = 0.1 + 0.9 * 0.5


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        (dict(N=10), {0: 1.0, 5: 1.0, 9: 1.0, 10: 1.0}),  # decay_frac 1: constant
        (dict(N=10, frac=0.0), {0: 1.0, 5: 0.5, 10: 0.0}),
        (dict(N=10, frac=0.1), {0: 1.0, 5: HALF_WAY_DOWN_TO_A_TENTH, 10: 0.1, 11: 0.1}),
        (dict(N=14, warmup=4, frac=0.0), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 9: 0.5, 14: 0.0}),
        (dict(N=4, warmup=4, frac=0.0), {0: 0.25, 3: 1.0, 4: 0.0}),  # warmup = N
        (dict(N=4, warmup=8, frac=0.0), {0: 0.125, 3: 0.5, 4: 0.625, 8: 0.0}),  # warmup > N
        (dict(N=0, frac=0.5), {0: 0.5}),
        (dict(N=0, warmup=0, frac=0.0), {0: 0.0}),
        (dict(N=1, frac=0.0), {0: 1.0, 1: 0.0}),
        (dict(N=8, frac=0.0, lr=0.0), {0: 0.0, 4: 0.0}),
    ],
)
def test_learning_rate(settings, table):
    assert schedule(table, **settings) == pytest.approx(list(table.values()), abs=1e-12)


def test_matrices_decay_and_vectors_do_not():
    gpt = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
    decaying, others = optim.parameter_groups(gpt, weight_decay=0.1)
    names = {id(p): name for name, p in gpt.named_parameters()}
    assert sorted(names[id(p)] for p in decaying["params"]) == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.wpe.weight",
        "transformer.wte.weight",
    ]
    assert len(decaying["params"]) + len(others["params"]) == len(names)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_adamw_has_the_constants_of_gpt2_training():
    gpt = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
    optimizer = optim.build(gpt, Config(learning_rate=1e-3, weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 1e-3)


def test_the_learning_rate_is_one_that_a_cuda_graph_can_read():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    optim.set_learning_rate(optimizer, 6e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [float(np.float32(6e-4))] != [6e-4]
