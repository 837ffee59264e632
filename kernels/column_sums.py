"""Column sums: gradients of biases, and of LayerNorm's weight.

    out[j] = Σ over p of partials[p, j]

A kernel that holds a gradient in registers sums its own rows: program p writes row p of `partials`, in fp32. The kernel
here adds the rows of up to three such matrices in a fixed order, so results are bitwise identical from run to run, and
no pass reads the gradients again. It moves n_partials·n_cols·4 bytes per sum.
"""

import torch
import triton
import triton.language as tl

from kernels import launch


@triton.jit
def _column_sums_kernel(
    partials_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    n_partials,
    N_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row = cols < N_COLS
    plane = tl.program_id(1)
    lanes = tl.zeros((BLOCK_M, BLOCK_N), partials_ptr.dtype.element_ty)
    for start in range(0, n_partials, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        offs = (plane.to(tl.int64) * n_partials + rows)[:, None] * N_COLS + cols[None, :]
        lanes += tl.load(partials_ptr + offs, mask=(rows < n_partials)[:, None] & in_row[None, :], other=0.0)
    total = tl.sum(lanes, 0)
    if plane == 0:
        if out0_ptr is not None:
            tl.store(out0_ptr + cols, total.to(out0_ptr.dtype.element_ty), mask=in_row)
    elif plane == 1:
        if out1_ptr is not None:
            tl.store(out1_ptr + cols, total.to(out1_ptr.dtype.element_ty), mask=in_row)
    else:
        if out2_ptr is not None:
            tl.store(out2_ptr + cols, total.to(out2_ptr.dtype.element_ty), mask=in_row)


def add_up(partials: torch.Tensor, *outs: torch.Tensor | None) -> None:
    """Write the column sums of partial sums.

    Args:
        partials: (len(outs), n_partials, n_cols), or (n_partials, n_cols) for one out; contiguous, fp32 or fp64.
        outs: one to three, each (n_cols,) and contiguous, or None for a sum that is not wanted.
    """
    n_partials, n_cols = partials.shape[-2:]
    if any(out is not None for out in outs):
        launch.run(
            _column_sums_kernel,
            (partials, *outs, *[None] * (3 - len(outs))),
            (n_partials,),
            lambda: _configure(partials, len(outs)),
            (n_cols, len(outs)),
        )


def _configure(partials: torch.Tensor, n_outs: int) -> tuple[tuple[int, ...], dict]:
    n_cols = partials.shape[-1]
    config = launch.lookup("column_sums", partials.device, partials.element_size())
    constants = {"N_COLS": n_cols, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "num_warps": config.num_warps}
    return (launch.cdiv(n_cols, config.block_n), n_outs), constants
