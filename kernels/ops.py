"""The table of ops. A backend is a value of type `Ops`; the model calls whatever functions it is given.

To mix backends, replace one entry: `EAGER._replace(attention=eager.sdpa_attention)`. What each function takes and
gives is written once, in `kernels/eager.py`; every backend has the same signatures.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels import eager


class Ops(NamedTuple):
    """One function an op. Shapes: B batch, T sequence, C width, V vocabulary."""

    embedding: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(idx (B, T), token_weight (V, C), position_weight (block_size, C)) -> (B, T, C)"""
    layer_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(x (..., C), weight, bias) -> (..., C)"""
    add_layer_norm: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
    ]
    """(residual, branch, weight, bias) -> (residual + branch, its layer_norm)"""
    gelu: Callable[[torch.Tensor], torch.Tensor]
    """x -> same shape"""
    attention: Callable[[torch.Tensor, int], torch.Tensor]
    """(qkv (B, T, 3C), n_head) -> (B, T, C)"""
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(logits (..., V), targets (...)) -> ()"""
    linear_cross_entropy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(hidden (..., C), weight (V, C), targets (...)) -> ()"""


EAGER = Ops(*(getattr(eager, name) for name in Ops._fields))
EAGER_SDPA = EAGER._replace(attention=eager.sdpa_attention)
