"""Column sums, for the gradients of biases: the sum over rows of a gradient that a kernel held in registers.

    dbias[j] = Σᵢ dy[i, j],   from sums[p, j] over the rows i of program p

The kernel that computes dy writes a row of `sums` per program, in fp32. This one adds these rows in a fixed order,
so results are bitwise identical from run to run, and no pass reads dy again. It moves n_partials·n_cols·4 bytes.
"""

import torch
import triton
import triton.language as tl

from kernels import launch


@triton.jit
def _column_sums_kernel(
    sums_ptr, out_ptr, n_partials, N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), sums_ptr.dtype.element_ty)
    for start in range(0, n_partials, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < n_partials)[:, None] & (cols < N_COLS)[None, :]
        total += tl.load(sums_ptr + rows.to(tl.int64)[:, None] * N_COLS + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < N_COLS)


def add_up(sums: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of the rows of `sums`, (n_partials, n_cols), fp32 or fp64, to `out`, (n_cols,); both contiguous."""
    n_partials, n_cols = sums.shape
    launch.run(_column_sums_kernel, (sums, out), (n_partials,), lambda: _configure(sums), n_cols)


def _configure(sums: torch.Tensor) -> tuple[tuple[int, ...], dict]:
    n_cols = sums.shape[1]
    config = launch.lookup("column_sums", sums.device, sums.element_size())
    constants = {"N_COLS": n_cols, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "num_warps": config.num_warps}
    return (launch.cdiv(n_cols, config.block_n),), constants
