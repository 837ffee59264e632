"""Activation recomputation: a linear layer that saves the inputs of the op before it and recomputes its own input in
backward.

GELU and LayerNorm save their inputs in any case. The matmul after each would also save their outputs, 4·C and C
elements per token. Recomputing one costs a pass over memory (Chen et al. 2016, https://arxiv.org/abs/1604.06174;
llm.c's -r).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.dispatch import autocast_dtype


class OpCall(NamedTuple):
    """A call of an op that returns one tensor."""

    op: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]


class Linear(nn.Linear):
    """torch.nn.Linear that can recompute its input in backward."""

    def forward(self, x: torch.Tensor, recompute_from: OpCall | None = None) -> torch.Tensor:
        """Apply the layer. Results and gradients are bitwise identical with and without recomputation.

        Args:
            x: (..., in_features).
            recompute_from: the call that returned x. Its inputs are saved for backward, which repeats it; None saves x.

        Returns:
            (..., out_features)
        """
        if recompute_from is None or x.is_meta:  # meta tensors have no memory to save, and no autocast
            return F.linear(x, self.weight, self.bias)
        op, inputs = recompute_from
        dtype = autocast_dtype(x.device, x.dtype)
        # Cast outside of the function, so that autograd casts the gradients back.
        return _RecomputingLinear.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), op, *inputs)


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
