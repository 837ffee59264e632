"""What the kernels of LayerNorm share: tiles of rows, and their launch parameters."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import launch
from kernels.dispatch import PLAIN

HIGHEST = tl.constexpr(3.4028234663852886e38)
"""the largest number in fp32"""


@triton.jit
def offsets(rows, stride, cols, ALIGN: tl.constexpr):
    """Offsets of a tile, (BLOCK_M, BLOCK_N). ALIGN divides the stride, and so decides how wide accesses can be."""
    return tl.multiple_of(rows * stride, ALIGN)[:, None] + cols[None, :]


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(..., C) as contiguous rows, and their stride; without a copy where the strides of x allow it."""
    if x.is_contiguous() and type(x) in PLAIN:  # who counts launches on fake tensors sees the shape (n_rows, C)
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def constants_of(
    op: str, r: torch.Tensor, *strides: int | None, **others: float
) -> tuple[launch.LaunchConfig, dict[str, Any]]:
    """The launch configuration of `op` for the rows of r, and what it makes of a kernel's constants.

    strides: of all tensors that it reads by rows.
    """
    n_cols = r.shape[-1]
    config = launch.lookup(op, r.device, r.element_size(), n_cols)
    return config, others | {
        "N_COLS": n_cols,
        "ALIGN": math.gcd(16, *(stride for stride in strides if stride is not None)),
        "COMPUTE_DTYPE": launch.compute_dtype(r.dtype),
        "BLOCK_N": config.block_n or launch.next_power_of_2(n_cols),
        "NUM_STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "maxnreg": config.max_registers,
    }
