"""The reference against its formulas, written out in NumPy's float64, and its gradients against finite differences."""

import math

import numpy as np
import pytest
import torch

from kernels import eager
from kernels.ops import EAGER, SDPA, Ops

B, T, C, H, V = 2, 7, 12, 3, 17
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # some hundred roundings of values near 1, and near 10
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
attentions = pytest.mark.parametrize("attention", [eager.attention, eager.sdpa_attention], ids=["explicit", "sdpa"])


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + len(shape))
    return (mean + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def ids(*shape: int, below: int) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(9))


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def check(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    np.testing.assert_allclose(exact(actual), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def gradcheck(function, *inputs: torch.Tensor) -> None:
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def test_the_table_names_the_functions():
    for name in Ops._fields:
        assert getattr(EAGER, name) is getattr(eager, name)
    differing = [name for name in Ops._fields if getattr(EAGER, name) is not getattr(SDPA, name)]
    assert differing == ["attention"] and SDPA.attention is eager.sdpa_attention


@dtypes
def test_embedding(dtype):
    idx, tokens, positions = ids(B, T, below=V), normal(V, C, dtype=dtype), normal(T + 3, C, dtype=dtype, seed=1)
    expected = np.empty((B, T, C))
    for b in range(B):
        for t in range(T):
            expected[b, t] = exact(tokens)[idx[b, t]] + exact(positions)[t]
    check(eager.embedding(idx, tokens, positions), expected, dtype)


def test_embedding_gradients():
    idx = ids(B, T, below=V)
    gradcheck(lambda tokens, positions: eager.embedding(idx, tokens, positions), normal(V, 3), normal(T + 3, 3, seed=1))


def layer_norm_formula(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean = x.sum(-1, keepdims=True) / x.shape[-1]
    var = ((x - mean) ** 2).sum(-1, keepdims=True) / x.shape[-1]
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


@dtypes
def test_layer_norm(dtype):
    x, w, b = normal(B, T, C, dtype=dtype, mean=5.0), normal(C, dtype=dtype, seed=1), normal(C, dtype=dtype, seed=2)
    check(eager.layer_norm(x, w, b), layer_norm_formula(exact(x), exact(w), exact(b)), dtype)


def test_layer_norm_epsilon_counts_where_the_variance_is_small():
    x = 1e-3 * normal(B, T, C)
    check(
        eager.layer_norm(x, torch.ones(C, dtype=x.dtype), torch.zeros(C, dtype=x.dtype)),
        layer_norm_formula(exact(x), np.ones(C), np.zeros(C)),
        torch.float64,
    )


@dtypes
def test_add_layer_norm(dtype):
    residual, branch = normal(B, T, C, dtype=dtype), normal(B, T, C, dtype=dtype, seed=1, mean=5.0)
    w, b = normal(C, dtype=dtype, seed=2), normal(C, dtype=dtype, seed=3)
    total, normed = eager.add_layer_norm(residual, branch, w, b)
    check(total, exact(residual) + exact(branch), dtype)
    check(normed, layer_norm_formula(exact(total), exact(w), exact(b)), dtype)


def test_layer_norm_gradients():
    x, branch, w, b = normal(2, 3, 5), normal(2, 3, 5, seed=1), normal(5, seed=2), normal(5, seed=3)
    gradcheck(eager.layer_norm, x, w, b)
    gradcheck(eager.add_layer_norm, x, branch, w, b)


@dtypes
def test_gelu(dtype):
    x = 3 * normal(B, T, C, dtype=dtype)
    v = exact(x)
    inner = math.sqrt(2 / math.pi) * (v + 0.044715 * v * v * v)
    check(eager.gelu(x), v * 0.5 * (1 + (np.exp(2 * inner) - 1) / (np.exp(2 * inner) + 1)), dtype)


def test_gelu_far_from_zero_and_gradients():
    far = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], dtype=torch.float64)
    assert torch.equal(eager.gelu(far), far.clamp(min=0))
    gradcheck(eager.gelu, 2 * normal(4, 5))


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


@attentions
@dtypes
def test_attention(attention, dtype):
    qkv = normal(B, T, 3 * C, dtype=dtype)
    check(attention(qkv, H), attention_formula(exact(qkv)), dtype)


@attentions
def test_attention_does_not_see_the_future(attention):
    qkv = normal(B, T, 3 * C, dtype=torch.float32)
    changed = qkv.clone()
    changed[:, 4:] = 100 * normal(B, T - 4, 3 * C, dtype=torch.float32, seed=1)
    before, after = attention(qkv, H), attention(changed, H)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).any(dim=-1).all()

    qkv.requires_grad_()
    attention(qkv, H)[:, 3].sum().backward()
    assert torch.all(qkv.grad[:, 4:] == 0) and qkv.grad[:, :4].abs().sum() > 0


@attentions
def test_attention_gradients(attention):
    gradcheck(lambda qkv: attention(qkv, 2), normal(1, 4, 12))


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


@dtypes
def test_cross_entropy(dtype):
    logits, targets = 4 * normal(B, T, V, dtype=dtype), targets_with_gaps()
    loss = eager.cross_entropy(logits, targets)
    assert loss.shape == ()
    check(loss, np.array(cross_entropy_formula(exact(logits), targets.numpy())), dtype)


@dtypes
def test_linear_cross_entropy(dtype):
    hidden, weight, targets = normal(B, T, C, dtype=dtype), normal(V, C, dtype=dtype, seed=1), targets_with_gaps()
    expected = cross_entropy_formula(exact(hidden) @ exact(weight).T, targets.numpy())
    check(eager.linear_cross_entropy(hidden, weight, targets), np.array(expected), dtype)


def test_cross_entropy_gradients():
    targets = targets_with_gaps()
    gradcheck(lambda logits: eager.cross_entropy(logits, targets), normal(B, T, V))
    gradcheck(lambda x, w: eager.linear_cross_entropy(x, w, targets), normal(B, T, 3), normal(V, 3, seed=1))


def test_what_does_not_count_gets_no_gradient():
    logits, targets = normal(B, T, V).requires_grad_(), targets_with_gaps()
    eager.cross_entropy(logits, targets).backward()
    counted = logits.grad.abs().sum(dim=-1) > 0
    assert torch.equal(counted, targets != -1)


def test_loss_where_nothing_counts():
    logits = normal(B, T, V).requires_grad_()
    loss = eager.cross_entropy(logits, torch.full((B, T), -1))
    assert torch.isnan(loss)
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("target", [V, 2 * V, -5])
def test_target_out_of_range(target):
    targets = torch.full((B, T), target)
    with pytest.raises(IndexError, match="out of bounds"):
        eager.cross_entropy(normal(B, T, V), targets)
