"""LayerNorm of rows that are too wide for a tile of registers, in blocks of columns; formulas in kernels/layer_norm.py.

Forward gives each row a program that reads it three times, the second and third time mostly from L2: for the mean, for
the variance around it, and to normalise. So the variance is as exact as that of narrow rows. Backward first takes the
means of wdy·x_hat and wdy over each row. With these a column needs no other one, and the kernel of narrow rows takes a
block of them; dy and x are read twice.
"""

import torch
import triton
import triton.language as tl

from kernels import launch
from kernels.norm_rows import HIGHEST, constants_of


@triton.jit
def _piece(ptr, row, stride, cols, in_row, ALIGN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """A block of columns of a row, (BLOCK_N,)."""
    return tl.load(ptr + tl.multiple_of(row * stride, ALIGN) + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)


@triton.jit
def _wide_layer_norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    statistics_ptr,
    n_rows,
    stride_x,
    stride_branch,
    N_COLS: tl.constexpr,
    EPS: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros((BLOCK_N,), COMPUTE_DTYPE)
    squares = tl.zeros((BLOCK_N,), COMPUTE_DTYPE)
    for step in tl.static_range(3):
        if step == 1:
            rough_mean = tl.sum(lanes, 0) / N_COLS
            lanes = tl.zeros((BLOCK_N,), COMPUTE_DTYPE)
        if step == 2:
            # As in narrow rows: the rounding error of the mean, and a variance that may overflow.
            rest = tl.sum(lanes, 0) / N_COLS
            variance = tl.sum(squares, 0) / N_COLS - tl.minimum(rest * rest, HIGHEST)
            rstd = tl.rsqrt(tl.maximum(variance, 0.0) + EPS)
            tl.store(statistics_ptr + row, rough_mean + rest)
            tl.store(statistics_ptr + n_rows + row, rstd)
        for start in tl.range(0, N_COLS, BLOCK_N, num_stages=NUM_STAGES):
            cols = start + tl.arange(0, BLOCK_N)
            in_row = cols < N_COLS
            x = _piece(x_ptr, row, stride_x, cols, in_row, ALIGN, COMPUTE_DTYPE)
            if branch_ptr is not None:
                branch = _piece(branch_ptr, row, stride_branch, cols, in_row, ALIGN, COMPUTE_DTYPE)
                if branch_bias_ptr is not None:
                    branch += tl.load(branch_bias_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
                residual = (x + branch).to(residual_ptr.dtype.element_ty)
                x = residual.to(COMPUTE_DTYPE)
                if step == 0:
                    tl.store(residual_ptr + row * N_COLS + cols, residual, mask=in_row)
            if step == 0:
                lanes += x
            elif step == 1:
                centred = tl.where(in_row, x - rough_mean, 0.0)
                lanes += centred
                squares += centred * centred
            else:
                y = ((x - rough_mean) - rest) * rstd
                if weight_ptr is not None:
                    y *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
                if bias_ptr is not None:
                    y += tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
                tl.store(y_ptr + row * N_COLS + cols, y.to(y_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _wide_layer_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    statistics_ptr,
    weight_ptr,
    means_ptr,
    n_rows,
    stride_dy,
    stride_x,
    N_COLS: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(statistics_ptr + row)
    rstd = tl.load(statistics_ptr + n_rows + row)
    along_x_hat = tl.zeros((BLOCK_N,), COMPUTE_DTYPE)
    along_ones = tl.zeros((BLOCK_N,), COMPUTE_DTYPE)
    for start in tl.range(0, N_COLS, BLOCK_N, num_stages=NUM_STAGES):
        cols = start + tl.arange(0, BLOCK_N)
        in_row = cols < N_COLS
        x = _piece(x_ptr, row, stride_x, cols, in_row, ALIGN, COMPUTE_DTYPE)
        wdy = _piece(dy_ptr, row, stride_dy, cols, in_row, ALIGN, COMPUTE_DTYPE)
        if weight_ptr is not None:
            wdy *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
        along_x_hat += wdy * ((x - mean) * rstd)
        along_ones += wdy
    tl.store(means_ptr + row, tl.sum(along_x_hat, 0) / N_COLS)
    tl.store(means_ptr + n_rows + row, tl.sum(along_ones, 0) / N_COLS)


def _configure(r: torch.Tensor, *strides: int | None, **others: float) -> tuple[tuple[int, ...], dict]:
    return (r.numel() // r.shape[-1],), constants_of("wide_layer_norm", r, *strides, **others)[1]


def launch_forward(
    tensors: tuple[torch.Tensor | None, ...], numbers: tuple[int | None, ...], r: torch.Tensor, eps: float
) -> None:
    """Launch the forward kernel with its tensors and numbers, on a row of r per program."""
    _, *strides = numbers
    launch.run(
        _wide_layer_norm_fwd_kernel,
        tensors,
        numbers,
        lambda: _configure(r, *strides, EPS=eps),
        (r.shape[-1], eps),
    )


def row_means(
    dy: torch.Tensor,
    r: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    n_rows: int,
    stride_dy: int,
    stride_r: int,
) -> torch.Tensor:
    """Means of wdy·x_hat and of wdy over each row, (2, n_rows) in the dtype of statistics."""
    means = statistics.new_empty((2, n_rows))
    launch.run(
        _wide_layer_norm_bwd_kernel,
        (dy, r, statistics, weight, means),
        (n_rows, stride_dy, stride_r),
        lambda: _configure(r, stride_dy, stride_r),
        r.shape[-1],
    )
    return means
