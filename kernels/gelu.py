"""GELU in its tanh form (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415), forward and backward.

    y  = 0.5·x·(1 + tanh(u)) = x·σ(2u),    u = √(2/π)·(x + 0.044715·x³)
    dx = dy·(s + x·s·(1 − s)·2u'),         s = σ(2u),  u' = √(2/π)·(1 + 3·0.044715·x²)

Written with σ, nothing cancels for large negative x, as 1 + tanh does. x: any shape, fp32, fp16 or bf16; y and dx have
its dtype. Saved for backward: x. A call on n elements of `itemsize` bytes moves 2·n·itemsize bytes forward and
3·n·itemsize backward, with about 10 and 20 FLOPs per element: both are memory-bound.
"""

import torch
import triton
import triton.language as tl

from kernels import column_sums, launch
from kernels.cost import Cost
from kernels.dispatch import check, register

TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
LOG2_E = tl.constexpr(1.4426950408889634)
CUBIC = tl.constexpr(0.044715)
PROGRAMS_PER_SM = 4
SATURATED = tl.constexpr(12.0)
"""beyond ±SATURATED σ(2u) is 0 or 1 in fp32, so clamping x changes nothing and keeps x³ from overflowing"""


@triton.jit
def _sigmoid_2u(x):
    x = tl.minimum(tl.maximum(x, -SATURATED), SATURATED)
    return 1.0 / (1.0 + tl.exp2((x * x * x * CUBIC + x) * (-TWICE_SQRT_2_OVER_PI * LOG2_E)))


@triton.jit
def _dx(dy, x):
    s = _sigmoid_2u(x)
    bounded = tl.minimum(tl.maximum(x, -SATURATED), SATURATED)
    slope = (bounded * bounded * (3.0 * CUBIC) + 1.0) * TWICE_SQRT_2_OVER_PI
    # bounded and not x: for an s of 1 − 2⁻²⁴, which a GPU's division may return, an x of 1e38 would give a huge slope.
    return dy * (s + bounded * (s * (1.0 - s) * slope))


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, n_elements, COMPUTE_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
    tl.store(y_ptr + offs, (x * _sigmoid_2u(x)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, n_elements, COMPUTE_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
    tl.store(dx_ptr + offs, _dx(dy, x).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_dbias_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    sums_ptr,
    n_rows,
    N_COLS: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dx of rows of N_COLS, and its column sums over the rows of this program, (tl.num_programs(1), N_COLS)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    for tile in tl.range(tl.program_id(1), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(1), num_stages=NUM_STAGES):
        rows = (tl.arange(0, BLOCK_M) + tile * BLOCK_M).to(tl.int64)
        offs = rows[:, None] * N_COLS + cols[None, :]
        mask = (rows < n_rows)[:, None] & (cols < N_COLS)[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
        dx = _dx(dy, x)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        sums += dx
    tl.store(sums_ptr + tl.program_id(1) * N_COLS + cols, tl.sum(sums, 0), mask=cols < N_COLS)


def _launch(kernel: triton.JITFunction, *tensors: torch.Tensor) -> None:
    """Run an elementwise kernel on contiguous tensors of one shape. It writes the last one."""
    x = tensors[-1]
    if x.numel() > 0:
        launch.run(kernel, tensors, (x.numel(),), lambda: _configure(x))


def _configure(x: torch.Tensor) -> tuple[tuple[int, ...], dict]:
    config = launch.lookup("gelu", x.device, x.element_size())
    constants = {
        "COMPUTE_DTYPE": launch.compute_dtype(x.dtype),
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (launch.cdiv(x.numel(), config.block_n),), constants


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def forward(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(_gelu_fwd_kernel, x, y)
    return y


def backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    dx = torch.empty_like(x)
    _launch(_gelu_bwd_kernel, dy.contiguous(), x, dx)
    return dx


def backward_with_dbias(dy: torch.Tensor, x: torch.Tensor, dbias: torch.Tensor) -> torch.Tensor:
    """dx of contiguous dy and x, (n_rows, n_cols). Its column sums go to dbias, (n_cols,)."""
    n_rows, n_cols = x.shape
    if n_rows == 0:
        dbias.zero_()
        return torch.empty_like(x)
    dx, n_programs = torch.empty_like(x), _dbias_grid(x)[1]
    sums = x.new_empty((n_programs, n_cols), dtype=launch.wide_dtype(x.dtype))
    launch.run(_gelu_bwd_dbias_kernel, (dy, x, dx, sums), (n_rows,), lambda: _configure_dbias(x), n_cols)
    column_sums.add_up(sums, dbias)
    return dx


def _dbias_grid(x: torch.Tensor) -> tuple[int, int]:
    """(blocks of columns, programs that share the rows of each)"""
    n_rows, n_cols = x.shape
    config = launch.lookup("gelu_dbias", x.device, x.element_size())
    n_blocks = launch.cdiv(n_cols, config.block_n)
    programs = launch.cdiv(PROGRAMS_PER_SM * launch.n_programs(x.device), n_blocks)
    return n_blocks, min(programs, launch.cdiv(n_rows, config.block_m))


def _configure_dbias(x: torch.Tensor) -> tuple[tuple[int, ...], dict]:
    config = launch.lookup("gelu_dbias", x.device, x.element_size())
    constants = {
        "N_COLS": x.shape[1],
        "COMPUTE_DTYPE": launch.compute_dtype(x.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
    return _dbias_grid(x), constants


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    (x,) = ctx.saved_tensors
    return _gelu_backward(dy, x)


_gelu_backward = register("gelu_backward", backward, lambda dy, x: _empty(x))
_gelu = register("gelu", forward, _empty, _save, _differentiate)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).

    Args:
        x: any shape and strides; fp32, fp16 or bf16 (fp64 for gradcheck). Autocast does not change its dtype.

    Returns:
        Same shape and dtype, contiguous: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), computed in fp32 (fp64 for fp64).

    Raises:
        ValueError: x has another dtype.
    """
    check("gelu", {"x": x})
    return _gelu(x)


def forward_cost(n_elements: int, itemsize: int) -> Cost:
    """Reads x, writes y."""
    return Cost(2 * n_elements * itemsize, 10 * n_elements)


def backward_cost(n_elements: int, itemsize: int) -> Cost:
    """Reads x and dy, writes dx; recomputes σ."""
    return Cost(3 * n_elements * itemsize, 20 * n_elements)
