"""The reference: every op of the table in plain PyTorch, slow and obvious.

Kernels are tested against these functions. Shapes: B batch, T sequence, C width, H heads, D = C/H head_dim, V
vocabulary. Floating-point inputs may have any dtype, the same for all; gradients come from autograd.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

LAYER_NORM_EPS = 1e-5
IGNORE_INDEX = -1


def embedding(
    idx: torch.Tensor, token_weight: torch.Tensor, position_weight: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Token embedding plus position embedding.

    Args:
        idx: (B, T) int64 token ids.
        token_weight: (V, C).
        position_weight: (block_size, C), block_size >= T.
        dtype: of the result; None for that of the weights.

    Returns:
        (B, T, C): token_weight[idx] + position_weight[:T].
    """
    positions = torch.arange(idx.shape[1], device=idx.device)
    look_up = _Lookup.apply if torch.compiler.is_compiling() else F.embedding
    y = look_up(idx, token_weight) + look_up(positions, position_weight)
    return y if dtype is None else y.to(dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, biased variance, eps 1e-5 (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,).

    Returns:
        (..., C): (x − mean)/√(var + eps)·weight + bias.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, LAYER_NORM_EPS)


def add_layer_norm(
    residual: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    branch_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    Args:
        residual: (..., C), the stream.
        branch: (..., C), the output of attention or of the MLP.
        weight: (C,).
        bias: (C,).
        branch_bias: (C,), a bias that the branch still lacks; None for none.

    Returns:
        (residual + (branch + branch_bias), its layer_norm), both (..., C).
    """
    residual = residual + (branch if branch_bias is None else branch + branch_bias)
    return residual, layer_norm(residual, weight, bias)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).

    Args:
        x: any shape.

    Returns:
        Same shape: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).
    """
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def attention(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
    """Causal self-attention that materialises the (T, T) matrix (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Args:
        qkv: (B, T, 3C), query, key and value side by side in that order; each is n_head heads of C/n_head.
        n_head: number of heads, a divisor of C.

    Returns:
        (B, T, C): softmax(q·kᵀ/√D over positions up to the query's)·v, heads side by side.
    """
    q, k, v = _split_heads(qkv, n_head)
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
    T = qkv.shape[1]
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    return _merge_heads(F.softmax(scores, dim=-1) @ v)


def sdpa_attention(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
    """`attention` by torch's scaled_dot_product_attention, which need not materialise the (T, T) matrix."""
    q, k, v = _split_heads(qkv, n_head)
    return _merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Attention of one query per head to the first keys of a cache: the last row of `attention`.

    Args:
        q: (B, H, D).
        k_cache: (B, H, T, D).
        v_cache: (B, H, T, D), finite beyond the lengths too.
        lengths: (B,) integers, how many keys each sequence has, from 1 to T.

    Returns:
        (B, H, D): softmax(k·q/√D over the first lengths[b] keys)·v.
    """
    scores = (q[:, :, None] @ k_cache.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
    beyond = torch.arange(k_cache.shape[2], device=q.device) >= lengths[:, None]
    scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    return (F.softmax(scores, dim=-1) @ v_cache).squeeze(2)


def sdpa_decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """`decode_attention` by torch's scaled_dot_product_attention."""
    if lengths.is_cpu and bool((lengths == k_cache.shape[2]).all()):  # on a GPU looking would mean waiting for it
        return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache).squeeze(2)
    within = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=within[:, None, None]).squeeze(2)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the targets that are not −1.

    Args:
        logits: (..., V).
        targets: (...) int64, each −1 (ignored) or in [0, V).

    Returns:
        () loss in nats; NaN if all targets are ignored, as in torch.
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of the tied head: cross_entropy(hidden·weightᵀ, targets).

    Args:
        hidden: (..., C).
        weight: (V, C).
        targets: (...) int64, each −1 (ignored) or in [0, V).

    Returns:
        () loss in nats.
    """
    return cross_entropy(F.linear(hidden, weight), targets)


class _Lookup(torch.autograd.Function):
    """F.embedding whose backward is one op for torch.compile too. It would otherwise generate atomic additions, whose
    order, and so the result, differs from run to run."""

    @staticmethod
    def forward(ctx: Any, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(idx)
        ctx.n_rows = len(weight)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[None, torch.Tensor]:
        (idx,) = ctx.saved_tensors
        return None, _lookup_backward(dy, idx, ctx.n_rows)


@torch.library.custom_op("tritongpt::lookup_backward", mutates_args=())
def _lookup_backward(dy: torch.Tensor, idx: torch.Tensor, n_rows: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, idx, n_rows, -1, False)


@_lookup_backward.register_fake
def _(dy: torch.Tensor, idx: torch.Tensor, n_rows: int) -> torch.Tensor:
    return dy.new_empty((n_rows, dy.shape[-1]))


def _split_heads(qkv: torch.Tensor, n_head: int) -> tuple[torch.Tensor, ...]:
    """(B, T, 3C) to three views of (B, H, T, D)."""
    B, T, width = qkv.shape
    head_dim = width // 3 // n_head
    return tuple(part.view(B, T, n_head, head_dim).transpose(1, 2) for part in qkv.split(width // 3, dim=2))


def _merge_heads(y: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) to (B, T, C)."""
    return y.transpose(1, 2).flatten(2)
