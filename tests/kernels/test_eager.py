"""The reference against its formulas, written out in NumPy's float64, and its gradients against finite differences."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kernels import eager
from kernels.ops import EAGER, SDPA, Ops

B, T, C, H, V = 2, 5, 6, 3, 11
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # some hundred roundings of values near 1, and near 10


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + len(shape))
    return (mean + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def ids(*shape: int, below: int) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(9))


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_the_table_names_the_functions():
    for name in Ops._fields:
        assert getattr(EAGER, name) is getattr(eager, name)
    differing = [name for name in Ops._fields if getattr(EAGER, name) is not getattr(SDPA, name)]
    assert differing == ["attention", "decode_attention"]
    assert (SDPA.attention, SDPA.decode_attention) == (eager.sdpa_attention, eager.sdpa_decode_attention)


def embedding_formula(idx: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.array([[tokens[idx[b, t]] + positions[t] for t in range(T)] for b in range(B)])


def layer_norm_formula(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean = x.sum(-1, keepdims=True) / x.shape[-1]
    var = ((x - mean) ** 2).sum(-1, keepdims=True) / x.shape[-1]
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def add_layer_norm_formula(residual, branch, weight, bias, branch_bias=0.0) -> tuple:
    total = residual + branch + branch_bias
    return total, layer_norm_formula(total, weight, bias)


def gelu_formula(x: np.ndarray) -> np.ndarray:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x * 0.5 * (1 + (np.exp(2 * inner) - 1) / (np.exp(2 * inner) + 1))


def attention_formula(qkv: np.ndarray) -> np.ndarray:
    """One query at a time, over the positions up to its own."""
    D = C // H
    y = np.empty((B, T, C))
    for b in range(B):
        for h in range(H):
            head = slice(h * D, (h + 1) * D)
            q, k, v = (qkv[b, :, part * C : (part + 1) * C][:, head] for part in range(3))
            for t in range(T):
                scores = k[: t + 1] @ q[t] / math.sqrt(D)
                p = np.exp(scores - scores.max())
                y[b, t, head] = (p / p.sum()) @ v[: t + 1]
    return y


def decode_formula(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: torch.Tensor) -> np.ndarray:
    """One head at a time, over the keys that its sequence has."""
    out = np.empty_like(q)
    for b, h in np.ndindex(q.shape[:2]):
        keys, values = (x[b, h, : lengths[b]] for x in (k, v))
        p = np.exp(keys @ q[b, h] / math.sqrt(q.shape[-1]))
        out[b, h] = (p / p.sum()) @ values
    return out


def cross_entropy_formula(logits: np.ndarray, targets: np.ndarray) -> float:
    losses = []
    for row, target in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), strict=True):
        if target != -1:
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
    return sum(losses) / len(losses)


def targets_with_gaps() -> torch.Tensor:
    targets = ids(B, T, below=V)
    targets[0, 2:] = -1
    return targets


class Case(NamedTuple):
    op: Callable
    formula: Callable
    inputs: tuple[torch.Tensor, ...]


def decode_case(op: Callable, *lengths: int) -> Case:
    cache, of_keys = (normal(B, H, C), normal(B, H, T, C), normal(B, H, T, C, seed=1)), torch.tensor(lengths)
    return Case(functools.partial(op, lengths=of_keys), functools.partial(decode_formula, lengths=of_keys), cache)


IDX, TARGETS = ids(B, T, below=V), targets_with_gaps()
X, BRANCH, WEIGHT, BIAS = normal(B, T, C, mean=5.0), normal(B, T, C, seed=1), normal(C, seed=2), normal(C, seed=3)
CASES = {
    "embedding": Case(
        lambda tokens, positions: eager.embedding(IDX, tokens, positions),
        lambda tokens, positions: embedding_formula(IDX.numpy(), tokens, positions),
        (normal(V, C), normal(T + 3, C, seed=1)),
    ),
    "layer_norm": Case(eager.layer_norm, layer_norm_formula, (X, WEIGHT, BIAS)),
    "layer_norm's epsilon": Case(eager.layer_norm, layer_norm_formula, (1e-3 * BRANCH, WEIGHT, BIAS)),
    "add_layer_norm": Case(eager.add_layer_norm, add_layer_norm_formula, (BRANCH, X, WEIGHT, BIAS)),
    "branch_bias": Case(eager.add_layer_norm, add_layer_norm_formula, (BRANCH, X, WEIGHT, BIAS, normal(C, seed=4))),
    "gelu": Case(eager.gelu, gelu_formula, (3 * BRANCH,)),
    "attention": Case(lambda qkv: eager.attention(qkv, H), attention_formula, (normal(B, T, 3 * C),)),
    "sdpa_attention": Case(lambda qkv: eager.sdpa_attention(qkv, H), attention_formula, (normal(B, T, 3 * C),)),
    "decode_attention": decode_case(eager.decode_attention, 1, T),
    "sdpa_decode_attention": decode_case(eager.sdpa_decode_attention, 1, T),
    "sdpa_decode_attention of full caches": decode_case(eager.sdpa_decode_attention, T, T),
    "cross_entropy": Case(
        lambda logits: eager.cross_entropy(logits, TARGETS),
        lambda logits: cross_entropy_formula(logits, TARGETS.numpy()),
        (4 * normal(B, T, V),),
    ),
    "linear_cross_entropy": Case(
        lambda hidden, weight: eager.linear_cross_entropy(hidden, weight, TARGETS),
        lambda hidden, weight: cross_entropy_formula(hidden @ weight.T, TARGETS.numpy()),
        (BRANCH, normal(V, C, seed=1)),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_op_has_a_formula():
    assert set(Ops._fields) <= set(CASES)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@cases
def test_values(case, dtype):
    inputs = [x.to(dtype) for x in case.inputs]
    got, want = case.op(*inputs), case.formula(*map(exact, inputs))
    for actual, expected in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert actual.dtype == dtype and actual.shape == np.shape(expected)
        np.testing.assert_allclose(exact(actual), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@cases
def test_gradients(case):
    """Among them zeros: of the future, and where a target is −1."""
    assert torch.autograd.gradcheck(case.op, [x.clone().requires_grad_() for x in case.inputs])


def test_gelu_far_from_zero():
    far = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], dtype=torch.float64)
    assert torch.equal(eager.gelu(far), far.clamp(min=0))


def test_loss_where_nothing_counts():
    logits = normal(B, T, V).requires_grad_()
    loss = eager.cross_entropy(logits, torch.full((B, T), -1))
    assert torch.isnan(loss)
    loss.backward()
    assert not logits.grad.any()
