"""Memory for time: a linear layer that keeps what its input was made from, and makes it again in the backward pass.

A GELU and a LayerNorm keep their own inputs anyway; the matmul behind each would keep their outputs too, 4C and C
elements a token. Making one again costs a pass over memory (Chen et al. 2016, https://arxiv.org/abs/1604.06174; llm.c's
-r).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Linear):
    """torch.nn.Linear, with inputs that may be forgotten."""

    def forward(
        self, x: torch.Tensor, make: Callable[..., torch.Tensor] | None = None, *sources: torch.Tensor
    ) -> torch.Tensor:
        """The layer, to the bit the same whether x is kept or made again.

        Args:
            x: (..., in_features).
            make: makes x again from `sources`, to the bit; None keeps x for the backward pass.
            sources: what is kept instead.

        Returns:
            (..., out_features)
        """
        if make is None or x.is_meta:  # which has no memory to save, and no autocast
            return F.linear(x, self.weight, self.bias)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        # The casts stay outside of the function, where autograd undoes them.
        return _ForgetfulLinear.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), autocast, make, *sources)


class _ForgetfulLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        autocast: bool,
        make: Callable,
        *sources: torch.Tensor,
    ):
        ctx.save_for_backward(weight, *sources)
        ctx.autocast, ctx.make = autocast, make
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        weight, *sources = ctx.saved_tensors
        with torch.autocast(dy.device.type, dy.dtype, enabled=ctx.autocast):  # as x was made in the forward pass
            x = ctx.make(*sources)
        x, rows = x.to(dy.dtype).flatten(0, -2), dy.flatten(0, -2)
        dx = (rows @ weight).view(*dy.shape[:-1], weight.shape[1])
        return dx, rows.t() @ x, rows.sum(0), None, None, *(None for _ in sources)
