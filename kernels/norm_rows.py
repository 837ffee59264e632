"""What the kernels of LayerNorm share: tiles of rows, and sums over rows from the partial sums of programs."""

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


@triton.jit
def _layer_norm_partials_kernel(
    partials_ptr,
    dweight_ptr,
    dbias_ptr,
    dbranch_bias_ptr,
    n_partials,
    N_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row = cols < N_COLS
    which = tl.program_id(1)
    lanes = tl.zeros((BLOCK_M, BLOCK_N), partials_ptr.dtype.element_ty)
    for start in range(0, n_partials, BLOCK_M):
        rows = tl.arange(0, BLOCK_M) + start
        offs = (which * n_partials + rows)[:, None] * N_COLS + cols[None, :]
        lanes += tl.load(partials_ptr + offs, mask=(rows < n_partials)[:, None] & in_row[None, :], other=0.0)
    total = tl.sum(lanes, 0)
    if which == 0:
        if dweight_ptr is not None:
            tl.store(dweight_ptr + cols, total.to(dweight_ptr.dtype.element_ty), mask=in_row)
    elif which == 1:
        if dbias_ptr is not None:
            tl.store(dbias_ptr + cols, total.to(dbias_ptr.dtype.element_ty), mask=in_row)
    else:
        if dbranch_bias_ptr is not None:
            tl.store(dbranch_bias_ptr + cols, total.to(dbranch_bias_ptr.dtype.element_ty), mask=in_row)


def add_partials(
    partials: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    dbranch_bias: torch.Tensor | None,
) -> None:
    """Write the sums of partials, (2 or 3, n_partials, C) in fp32, over its second dimension, to those that are given.

    They are added in a fixed order, so the same partial sums give bitwise identical results.
    """
    n_sums, n_partials, n_cols = partials.shape

    def configure() -> tuple[tuple[int, ...], dict]:
        config = launch.lookup("layer_norm_partials", partials.device, partials.element_size())
        blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        return (launch.cdiv(n_cols, config.block_n), n_sums), blocks | {"N_COLS": n_cols, "num_warps": config.num_warps}

    tensors = (partials, dweight, dbias, dbranch_bias)
    if any(x is not None for x in tensors[1:]):
        launch.run(_layer_norm_partials_kernel, tensors, (n_partials,), configure, n_cols)


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
