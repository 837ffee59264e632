"""LayerNorm over the last dimension (Ba et al. 2016, https://arxiv.org/abs/1607.06450), alone and behind an addition.

    r     = residual + (branch + branch_bias)       only in add_layer_norm; rounded to its dtype before normalisation
    x_hat = (r − mean(r))·rstd,                     rstd = 1/√(var(r) + eps), biased variance
    y     = x_hat·weight + bias
    dr    = (wdy − mean(wdy) − x_hat·mean(wdy·x_hat))·rstd + dresidual,      wdy = dy·weight
    dw    = Σ dy·x_hat,   db = Σ dy                 over rows; and Σ dr, in fp32, for branch_bias

A call has n_rows rows of n_cols columns. Both ops have one forward kernel, so layer_norm(r) is bitwise identical to the
second output of add_layer_norm. Saved for backward: r (x in layer_norm) in its own dtype, mean and rstd per row in
fp32, and weight, but neither the branch nor y. A fixed number of programs shares the rows: each reads weight and bias,
and writes partial sums of dw, db and Σ dr (fp32), once per program instead of once per row. A second kernel adds the
partial sums in a fixed order. There are no atomics: the same inputs give bitwise identical results.

branch_bias is the bias of the linear layer that made the branch: added here, it costs no pass of its own in backward.

With R, Y and S bytes per element of r, y and branch, forward moves n_rows·n_cols·(R + Y) bytes and backward
n_rows·n_cols·(2R + Y). The addition costs R + S more per element forward, and R backward, or R + S if the dtypes of r
and branch differ. With about 11 and 14 FLOPs per element both are memory-bound. `forward_cost` and `backward_cost`
include the small terms.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import eager, launch
from kernels.cost import Cost
from kernels.dispatch import PLAIN, autocast_dtype, check, register

EPS = tl.constexpr(eager.LAYER_NORM_EPS)
HIGHEST = tl.constexpr(3.4028234663852886e38)
"""the largest number in fp32"""


@triton.jit
def _offsets(rows, stride, cols, ALIGN: tl.constexpr):
    """Offsets of a tile, (BLOCK_M, BLOCK_N). ALIGN divides the stride, and so decides how wide accesses can be."""
    return tl.multiple_of(rows * stride, ALIGN)[:, None] + cols[None, :]


@triton.jit
def _layer_norm_fwd_kernel(
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
    HAS_BRANCH: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    if HAS_BRANCH_BIAS:
        branch_bias = tl.load(branch_bias_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tl.arange(0, BLOCK_M) + tile * BLOCK_M).to(tl.int64)
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + _offsets(rows, stride_x, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        offs = rows[:, None] * N_COLS + cols[None, :]
        if HAS_BRANCH:
            branch_offs = _offsets(rows, stride_branch, cols, ALIGN)
            branch = tl.load(branch_ptr + branch_offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
            if HAS_BRANCH_BIAS:
                branch += branch_bias[None, :]
            x += branch
            residual = x.to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + offs, residual, mask=mask)
            x = residual.to(COMPUTE_DTYPE)
        rough_mean = tl.sum(x, 1) / N_COLS
        centred = tl.where(in_row[None, :], x - rough_mean[:, None], 0.0)
        # The rounding error of the mean. In a row of equal numbers it is all that is left, and rstd is 1/√eps.
        rest = tl.sum(centred, 1) / N_COLS
        # For a row beyond 1e19 the variance overflows fp32. rstd is then 0, as in eager; ∞ − ∞ would make it NaN.
        variance = tl.sum(centred * centred, 1) / N_COLS - tl.minimum(rest * rest, HIGHEST)
        rstd = tl.rsqrt(tl.maximum(variance, 0.0) + EPS)
        y = (centred - rest[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(statistics_ptr + rows, rough_mean + rest, mask=rows < n_rows)
        tl.store(statistics_ptr + n_rows + rows, rstd, mask=rows < n_rows)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dresidual_ptr,
    x_ptr,
    statistics_ptr,
    weight_ptr,
    dx_ptr,
    dbranch_ptr,
    partials_ptr,
    n_rows,
    stride_dy,
    stride_dresidual,
    stride_x,
    N_COLS: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DBRANCH: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    # One sum per lane; rows are added in a fixed order after the loop.
    dweight = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    if HAS_BRANCH_BIAS:
        dbranch_bias = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tl.arange(0, BLOCK_M) + tile * BLOCK_M).to(tl.int64)
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + _offsets(rows, stride_x, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        dy = tl.load(dy_ptr + _offsets(rows, stride_dy, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        mean = tl.load(statistics_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(statistics_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
        # In masked columns x_hat is not 0, but dy is, and so is every product of the two.
        x_hat = (x - mean[:, None]) * rstd[:, None]
        wdy = dy * weight[None, :]
        along_x_hat = tl.sum(wdy * x_hat, 1) / N_COLS
        along_ones = tl.sum(wdy, 1) / N_COLS
        dx = (wdy - (x_hat * along_x_hat[:, None] + along_ones[:, None])) * rstd[:, None]
        if HAS_DRESIDUAL:
            dresidual_offs = _offsets(rows, stride_dresidual, cols, ALIGN)
            dx += tl.load(dresidual_ptr + dresidual_offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
        offs = rows[:, None] * N_COLS + cols[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_DBRANCH:
            tl.store(dbranch_ptr + offs, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
        dweight += dy * x_hat
        dbias += dy
        if HAS_BRANCH_BIAS:
            dbranch_bias += dx  # 0 in masked rows, where rstd is 0
    partials_ptrs = partials_ptr + tl.program_id(0) * N_COLS + cols
    tl.store(partials_ptrs, tl.sum(dweight, 0), mask=in_row)
    tl.store(partials_ptrs + tl.num_programs(0) * N_COLS, tl.sum(dbias, 0), mask=in_row)
    if HAS_BRANCH_BIAS:
        tl.store(partials_ptrs + 2 * tl.num_programs(0) * N_COLS, tl.sum(dbranch_bias, 0), mask=in_row)


@triton.jit
def _layer_norm_partials_kernel(
    partials_ptr,
    dweight_ptr,
    dbias_ptr,
    dbranch_bias_ptr,
    n_partials,
    N_COLS: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), partials_ptr.dtype.element_ty)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), partials_ptr.dtype.element_ty)
    if HAS_BRANCH_BIAS:
        dbranch_bias = tl.zeros((BLOCK_M, BLOCK_N), partials_ptr.dtype.element_ty)
    for start in range(0, n_partials, BLOCK_M):
        rows = tl.arange(0, BLOCK_M) + start
        offs = rows[:, None] * N_COLS + cols[None, :]
        mask = (rows < n_partials)[:, None] & (cols < N_COLS)[None, :]
        dweight += tl.load(partials_ptr + offs, mask=mask, other=0.0)
        dbias += tl.load(partials_ptr + n_partials * N_COLS + offs, mask=mask, other=0.0)
        if HAS_BRANCH_BIAS:
            dbranch_bias += tl.load(partials_ptr + 2 * n_partials * N_COLS + offs, mask=mask, other=0.0)
    tl.store(dweight_ptr + cols, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=cols < N_COLS)
    tl.store(dbias_ptr + cols, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=cols < N_COLS)
    if HAS_BRANCH_BIAS:
        total = tl.sum(dbranch_bias, 0).to(dbranch_bias_ptr.dtype.element_ty)
        tl.store(dbranch_bias_ptr + cols, total, mask=cols < N_COLS)


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(..., C) as contiguous rows, and their stride; without a copy where the strides of x allow it."""
    if x.is_contiguous() and type(x) in PLAIN:  # who counts launches on fake tensors sees the shape (n_rows, C)
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def _configure(op: str, r: torch.Tensor, *strides: int | None, **flags: bool) -> tuple[tuple[int, ...], dict]:
    """Grid and constants of `op`, whose programs share the rows of r. strides: of all tensors that it reads by rows."""
    n_cols = r.shape[-1]
    config = launch.lookup(op, r.device, r.element_size(), n_cols)
    constants = flags | {
        "N_COLS": n_cols,
        "ALIGN": math.gcd(16, *(stride for stride in strides if stride is not None)),
        "COMPUTE_DTYPE": launch.compute_dtype(r.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": launch.next_power_of_2(n_cols),
        "NUM_STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "maxnreg": config.max_registers,
    }
    return (_n_programs(config, r),), constants


def _n_programs(config: launch.LaunchConfig, r: torch.Tensor) -> int:
    return min(config.programs * launch.n_programs(r.device), launch.cdiv(r.numel() // r.shape[-1], config.block_m))


def _launch_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    statistics: torch.Tensor,
) -> None:
    """Write y and statistics, and residual if there is a branch."""
    if x.numel() == 0:
        return
    n_rows, n_cols = x.numel() // x.shape[-1], x.shape[-1]
    flags = {"HAS_BRANCH": branch is not None, "HAS_BRANCH_BIAS": branch_bias is not None}
    r = x if residual is None else residual
    x, stride_x = _as_rows(x)
    branch, stride_branch = (None, None) if branch is None else _as_rows(branch)
    branch_bias = None if branch_bias is None else branch_bias.contiguous()
    launch.run(
        _layer_norm_fwd_kernel,
        (x, branch, branch_bias, weight.contiguous(), bias.contiguous(), residual, y, statistics),
        (n_rows, stride_x, stride_branch),
        lambda: _configure("layer_norm", r, stride_x, stride_branch, **flags),
        n_cols,
    )


def _launch_backward(
    dy: torch.Tensor,
    dresidual: torch.Tensor | None,
    r: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    dbranch: torch.Tensor | None,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    dbranch_bias: torch.Tensor | None,
) -> None:
    """Write dx, dweight and dbias, and dbranch and dbranch_bias if given."""
    sums = dweight, dbias, dbranch_bias
    if r.numel() == 0:
        for total in sums:
            if total is not None:
                total.zero_()
        return
    n_rows, n_cols = r.numel() // r.shape[-1], r.shape[-1]
    n_programs = _n_programs(launch.lookup("layer_norm_backward", r.device, r.element_size(), n_cols), r)
    partials = statistics.new_empty((2 if dbranch_bias is None else 3, n_programs, n_cols))
    r, stride_r = _as_rows(r)
    dy, stride_dy = _as_rows(dy)
    dresidual, stride_dresidual = (None, None) if dresidual is None else _as_rows(dresidual)
    strides = stride_dy, stride_dresidual, stride_r
    has_branch_bias = dbranch_bias is not None
    flags = {"HAS_DRESIDUAL": dresidual is not None, "HAS_DBRANCH": dbranch is not None}
    flags |= {"HAS_BRANCH_BIAS": has_branch_bias}
    launch.run(
        _layer_norm_bwd_kernel,
        (dy, dresidual, r, statistics, weight.contiguous(), dx, dbranch, partials),
        (n_rows, *strides),
        lambda: _configure("layer_norm_backward", r, *strides, **flags),
        n_cols,
    )
    launch.run(
        _layer_norm_partials_kernel,
        (partials, *sums),
        (n_programs,),
        lambda: _configure_partials(partials, HAS_BRANCH_BIAS=has_branch_bias),
        n_cols,
    )


def _configure_partials(partials: torch.Tensor, **flags: bool) -> tuple[tuple[int, ...], dict]:
    n_cols = partials.shape[-1]
    config = launch.lookup("layer_norm_partials", partials.device, partials.element_size())
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    return (launch.cdiv(n_cols, config.block_n),), flags | blocks | {"N_COLS": n_cols, "num_warps": config.num_warps}


def _empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of the shape of x."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def outputs(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of `forward`, empty."""
    return _empty(x, dtype), x.new_empty((2, *x.shape[:-1]), dtype=launch.wide_dtype(x.dtype))


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y, statistics: mean and rstd). dtype is y's."""
    y, statistics = outputs(x, weight, bias, dtype)
    _launch_forward(x, None, None, weight, bias, None, y, statistics)
    return y, statistics


def add_outputs(
    residual: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The outputs of `add_forward`, empty."""
    r = _empty(residual, torch.promote_types(residual.dtype, branch.dtype))
    return r, *outputs(r, weight, bias, dtype)


def add_forward(
    residual: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (residual + branch + branch_bias, y, statistics: mean and rstd). dtype is y's."""
    r, y, statistics = add_outputs(residual, branch, branch_bias, weight, bias, dtype)
    _launch_forward(residual, branch, branch_bias, weight, bias, r, y, statistics)
    return r, y, statistics


def empty_gradients(
    r: torch.Tensor,
    weight: torch.Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    branch_bias_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The outputs of `backward`, empty."""
    dbranch = r.new_empty(0) if branch_dtype == residual_dtype else _empty(r, branch_dtype)
    dbranch_bias = r.new_empty(0) if branch_bias_dtype is None else _empty(weight, branch_bias_dtype)
    return _empty(r, residual_dtype), dbranch, _empty(weight, weight.dtype), _empty(weight, bias_dtype), dbranch_bias


def backward(
    dy: torch.Tensor,
    dresidual: torch.Tensor | None,
    r: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    branch_bias_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dbranch, dw, db, dbranch_bias). If dbranch has the dtype of dx, it is empty, and dx is the gradient
    of both; dbranch_bias is empty if branch_bias_dtype is None."""
    gradients = empty_gradients(r, weight, residual_dtype, branch_dtype, bias_dtype, branch_bias_dtype)
    dx, dbranch, dweight, dbias, dbranch_bias = gradients
    written = None if branch_dtype == residual_dtype else dbranch
    summed = None if branch_bias_dtype is None else dbranch_bias
    _launch_backward(dy, dresidual, r, statistics, weight, dx, written, dweight, dbias, summed)
    return gradients


def _save(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.dtypes = x.dtype, x.dtype, bias.dtype


def _differentiate(ctx, dy, *_):
    dx, _, dweight, dbias, _ = _layer_norm_backward(dy, None, *ctx.saved_tensors, *ctx.dtypes)
    return dx, dweight, dbias, None


def _add_save(ctx, inputs, output):
    residual, branch, branch_bias, weight, bias, _ = inputs
    r, _, statistics = output
    ctx.save_for_backward(r, statistics, weight)
    ctx.dtypes = residual.dtype, branch.dtype, bias.dtype, None if branch_bias is None else branch_bias.dtype
    # Nothing reads the residual stream after the last LayerNorm. Its gradient is then None, and not a tensor of zeros.
    ctx.set_materialize_grads(False)


def _add_differentiate(ctx, dresidual, dy, *_):
    residual_dtype, branch_dtype, _, branch_bias_dtype = ctx.dtypes
    if dresidual is None and dy is None:
        return (None,) * 6
    if dy is None:
        total = None if branch_bias_dtype is None else dresidual.flatten(0, -2).sum(0).to(branch_bias_dtype)
        return dresidual.to(residual_dtype), dresidual.to(branch_dtype), total, None, None, None
    dx, dbranch, dweight, dbias, dbranch_bias = _layer_norm_backward(dy, dresidual, *ctx.saved_tensors, *ctx.dtypes)
    if branch_dtype == residual_dtype:
        dbranch = dx
    return dx, dbranch, None if branch_bias_dtype is None else dbranch_bias, dweight, dbias, None


_layer_norm_backward = register(
    "layer_norm_backward", backward, lambda dy, dresidual, r, statistics, *others: empty_gradients(r, *others)
)
_layer_norm = register("layer_norm", forward, outputs, _save, _differentiate, visible=1)
_add_layer_norm = register("add_layer_norm", add_forward, add_outputs, _add_save, _add_differentiate, visible=2)


def _check_widths(x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            shapes = f"{tuple(x.shape)} and {tuple(vector.shape)}"
            raise ValueError(f"{name} is as wide as a row of x; got x and {name} of {shapes}")


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, biased variance, eps 1e-5 (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Args:
        x: (..., C) of any strides, C at most 16384; fp32, fp16 or bf16 (fp64 for gradcheck).
        weight: (C,), any of these dtypes.
        bias: (C,), any of these dtypes.

    Returns:
        (..., C), contiguous: (x − mean)/√(var + eps)·weight + bias, computed in fp32 (fp64 for fp64). Its dtype is that
        of x, or under autocast autocast's.

    Raises:
        ValueError: weight or bias is not as wide as x, x is too wide, or a tensor has another dtype or device.
    """
    check("layer_norm", {"x": x, "weight": weight, "bias": bias})
    _check_widths(x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, autocast_dtype(x.device, x.dtype))


def add_layer_norm(
    residual: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    branch_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch, and the bias that belongs to it, to the residual stream and normalise the sum, in one pass.

    Args:
        residual: (..., C) of any strides, C at most 16384; fp32, fp16 or bf16 (fp64 for gradcheck).
        branch: same shape, any of these dtypes.
        weight: (C,), any of these dtypes.
        bias: (C,), any of these dtypes.
        branch_bias: (C,), any of these dtypes, which does not change those of the results: the bias of the linear layer
            that made the branch; None for none.

    Returns:
        (residual + (branch + branch_bias), its layer_norm), both (..., C) and contiguous. The sum is rounded once, to
        the dtype of torch's addition, also under autocast. The second is bitwise identical to `layer_norm` of it.

    Raises:
        ValueError: residual and branch differ in shape, weight, bias or branch_bias is not as wide, C is too large, or
            a tensor has another dtype or device.
    """
    if residual.shape != branch.shape:
        raise ValueError(f"residual and branch differ in shape: {tuple(residual.shape)} and {tuple(branch.shape)}")
    floats = {"residual": residual, "branch": branch, "weight": weight, "bias": bias}
    check("add_layer_norm", floats if branch_bias is None else floats | {"branch_bias": branch_bias})
    _check_widths(residual, weight=weight, bias=bias, branch_bias=branch_bias)
    # The dtype that the next matmul reads. Autocast would cast to it in a pass of its own.
    dtype = autocast_dtype(residual.device, torch.promote_types(residual.dtype, branch.dtype))
    return _add_layer_norm(residual, branch, branch_bias, weight, bias, dtype)


def forward_cost(
    n_rows: int,
    n_cols: int,
    residual_itemsize: int,
    normed_itemsize: int,
    weight_itemsize: int,
    branch_itemsize: int = 0,
    branch_bias_itemsize: int = 0,
) -> Cost:
    """Reads x, or residual, branch and branch_bias, weight and bias; writes y, mean, rstd and, with a branch, the sum.

    Args:
        n_rows: rows.
        n_cols: C.
        residual_itemsize: bytes per element of x, or of the residual stream.
        normed_itemsize: of y.
        weight_itemsize: of weight and of bias.
        branch_itemsize: of branch; 0 for layer_norm, which has none.
        branch_bias_itemsize: of branch_bias; 0 for none.
    """
    added = residual_itemsize + branch_itemsize if branch_itemsize else 0
    element = residual_itemsize + added + normed_itemsize
    flops = 11 + bool(branch_itemsize) + bool(branch_bias_itemsize)
    vectors = n_cols * (2 * weight_itemsize + branch_bias_itemsize)
    return Cost(n_rows * (n_cols * element + 8) + vectors, flops * n_rows * n_cols)


def backward_cost(
    n_rows: int,
    n_cols: int,
    residual_itemsize: int,
    normed_itemsize: int,
    weight_itemsize: int,
    branch_itemsize: int = 0,
    branch_bias_itemsize: int = 0,
) -> Cost:
    """Reads dy, r, mean, rstd, weight and, with a branch, dresidual; writes dx, dw, db, dbranch_bias and, if its dtype
    is not that of dx, dbranch.

    Args: as in `forward_cost`.
    """
    added = residual_itemsize if branch_itemsize else 0
    if branch_itemsize not in (0, residual_itemsize):
        added += branch_itemsize
    element = 2 * residual_itemsize + added + normed_itemsize
    flops = 14 + bool(branch_itemsize) + bool(branch_bias_itemsize)
    vectors = n_cols * (3 * weight_itemsize + branch_bias_itemsize)
    return Cost(n_rows * (n_cols * element + 8) + vectors, flops * n_rows * n_cols)
