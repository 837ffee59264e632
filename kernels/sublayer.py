"""The two halves of a block of GPT-2, composed of the ops of any table (`kernels.ops.Ops`, which imports this file).

    r = residual + (branch + bias)      the stream, whose addition the half before has left to this one
    attention:  branch = attention(LayerNorm(r)·Wᵀ + b)·W_outᵀ + b_out
    MLP:        branch = GELU(LayerNorm(r)·Wᵀ + b)·W_outᵀ + b_out

Activation recomputation (Chen et al. 2016, https://arxiv.org/abs/1604.06174; llm.c's -r): the matmuls after GELU and
LayerNorm save their inputs, 4·C and C elements per token. A level of 1 recomputes those of GELU in backward, 2 also
those of LayerNorm, with bitwise identical results.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kernels.dispatch import autocast_dtype

Affine = tuple[torch.Tensor, torch.Tensor]
"""weight and bias of a LayerNorm, (C,) each, or of a linear layer, (out, in) and (out,)"""


class Stream(NamedTuple):
    """The residual stream, in parts that are still to be added."""

    residual: torch.Tensor
    """(B, T, C)"""
    branch: torch.Tensor | None = None
    """(B, T, C)"""
    bias: torch.Tensor | None = None
    """(C,), of the linear layer that made the branch. Its gradient is a by-product of the next LayerNorm's backward."""

    def total(self) -> torch.Tensor:
        """The sum of the parts, (B, T, C)."""
        if self.branch is None:
            return self.residual
        bias = self.bias
        return self.residual + (self.branch if bias is None else self.branch + bias.to(self.branch.dtype))


def add_norm(ops: Any, stream: Stream, norm: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    """(the stream's sum, its LayerNorm), both (B, T, C)"""
    if stream.branch is None:
        return stream.residual, ops.layer_norm(stream.residual, *norm)
    bias = () if stream.bias is None else (no_wider(stream.bias, stream.residual, stream.branch),)
    return ops.add_layer_norm(stream.residual, stream.branch, *norm, *bias)


def no_wider(bias: torch.Tensor, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """`bias`, (C,), in a dtype that does not widen a stream of 16 bits."""
    dtype = torch.promote_types(residual.dtype, branch.dtype)
    return bias if torch.promote_types(bias.dtype, dtype) == dtype else bias.to(dtype)


def attention(ops: Any, stream: Stream, norm: Affine, linear: Affine, out: Affine, n_head: int, level: int) -> Stream:
    """The first half of a block. `Ops.attention_sublayer` documents the arguments."""
    residual, normed = add_norm(ops, stream, norm)
    qkv = _linear(normed, linear, (ops.layer_norm, residual, *norm) if level >= 2 else None)
    return Stream(residual, F.linear(ops.attention(qkv, n_head), *out))


def mlp(ops: Any, stream: Stream, norm: Affine, linear: Affine, out: Affine, level: int) -> Stream:
    """The second half of a block. `Ops.mlp_sublayer` documents the arguments."""
    residual, normed = add_norm(ops, stream, norm)
    h = _linear(normed, linear, (ops.layer_norm, residual, *norm) if level >= 2 else None)
    return Stream(residual, _linear(ops.gelu(h), out, (ops.gelu, h) if level >= 1 else None))


def _linear(x: torch.Tensor, affine: Affine, recompute_from: tuple[Any, ...] | None) -> torch.Tensor:
    """A linear layer. If `recompute_from` is the op that returned x, and its inputs, these are saved instead of x."""
    if recompute_from is None or x.is_meta:  # meta tensors have no memory to save, and no autocast
        return F.linear(x, *affine)
    dtype = autocast_dtype(x.device, x.dtype)
    # Cast outside of the function, so that autograd casts the gradients back.
    return _RecomputingLinear.apply(x.to(dtype), *(parameter.to(dtype) for parameter in affine), *recompute_from)


class _RecomputingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, op: Callable, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, *inputs)
        ctx.op, ctx.autocast = op, torch.is_autocast_enabled(x.device.type)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        with torch.autocast(dy.device.type, dy.dtype, enabled=ctx.autocast):  # as in forward
            x = ctx.op(*inputs)
        x, rows = x.to(dy.dtype).flatten(0, -2), dy.flatten(0, -2)
        dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1])
        return dx, rows.t() @ x, rows.sum(0), None, *(None for _ in inputs)
