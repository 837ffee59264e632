"""LayerNorm over the last dimension (Ba et al. 2016, https://arxiv.org/abs/1607.06450), alone and behind an addition.

    r     = residual + (branch + branch_bias)       only in add_layer_norm; rounded to its dtype before normalisation
    x_hat = (r − mean(r))·rstd,                     rstd = 1/√(var(r) + eps), biased variance
    y     = x_hat·weight + bias
    dr    = (wdy − mean(wdy) − x_hat·mean(wdy·x_hat))·rstd + dresidual,      wdy = dy·weight
    dw    = Σ dy·x_hat,   db = Σ dy                 over rows; and Σ dr, in fp32, for branch_bias

A call has n_rows rows of n_cols columns. Rows of more than 8,192 columns go to kernels/wide_layer_norm.py; what follows
is about the others. Both ops have one forward kernel, so layer_norm(r) is bitwise identical to the second output of
add_layer_norm. Saved for backward: r (x in layer_norm) in its own dtype, mean and rstd per row in fp32, and weight, but
neither the branch nor y. A fixed number of programs shares the rows: each reads weight and bias, and writes partial
sums of dw, db and Σ dr (fp32), once per program instead of once per row. kernels/column_sums.py adds them in a fixed
order. There are no atomics: the same inputs give bitwise identical results.

branch_bias is the bias of the linear layer that made the branch: added here, it costs no pass of its own in backward.

With R, Y and S bytes per element of r, y and branch, forward moves n_rows·n_cols·(R + Y) bytes and backward
n_rows·n_cols·(2R + Y). The addition costs R + S more per element forward, and R backward, or R + S if the dtypes of r
and branch differ. With about 11 and 14 FLOPs per element both are memory-bound. `forward_cost` and `backward_cost`
include the small terms.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels import column_sums, launch, wide_layer_norm
from kernels.cost import Cost
from kernels.dispatch import autocast_dtype, check, register
from kernels.eager import LAYER_NORM_EPS
from kernels.norm_rows import HIGHEST, as_rows, constants_of, offsets


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
    EPS: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N_COLS
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    if branch_bias_ptr is not None:
        branch_bias = tl.load(branch_bias_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tl.arange(0, BLOCK_M) + tile * BLOCK_M).to(tl.int64)
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + offsets(rows, stride_x, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        offs = rows[:, None] * N_COLS + cols[None, :]
        if branch_ptr is not None:
            branch_offs = offsets(rows, stride_branch, cols, ALIGN)
            branch = tl.load(branch_ptr + branch_offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
            if branch_bias_ptr is not None:
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
        y = (centred - rest[:, None]) * rstd[:, None]
        if weight_ptr is not None:
            y *= weight[None, :]
        if bias_ptr is not None:
            y += bias[None, :]
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
    means_ptr,
    dx_ptr,
    dbranch_ptr,
    partials_ptr,
    n_rows,
    stride_dy,
    stride_dresidual,
    stride_x,
    N_COLS: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)
    if means_ptr is not None:  # of a wide row, a block of columns
        cols += tl.program_id(1) * BLOCK_N
    in_row = cols < N_COLS
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    # One sum per lane; rows are added in a fixed order after the loop.
    dweight = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    if HAS_BRANCH_BIAS:
        dbranch_bias = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tl.arange(0, BLOCK_M) + tile * BLOCK_M).to(tl.int64)
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + offsets(rows, stride_x, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        dy = tl.load(dy_ptr + offsets(rows, stride_dy, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        mean = tl.load(statistics_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(statistics_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
        # In masked columns x_hat is not 0, but dy is, and so is every product of the two.
        x_hat = (x - mean[:, None]) * rstd[:, None]
        wdy = dy
        if weight_ptr is not None:
            wdy *= weight[None, :]
        if means_ptr is None:
            along_x_hat = tl.sum(wdy * x_hat, 1) / N_COLS
            along_ones = tl.sum(wdy, 1) / N_COLS
        else:
            along_x_hat = tl.load(means_ptr + rows, mask=rows < n_rows, other=0.0)
            along_ones = tl.load(means_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
        dx = (wdy - (x_hat * along_x_hat[:, None] + along_ones[:, None])) * rstd[:, None]
        if dresidual_ptr is not None:
            dresidual_offs = offsets(rows, stride_dresidual, cols, ALIGN)
            dx += tl.load(dresidual_ptr + dresidual_offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
        offs = rows[:, None] * N_COLS + cols[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbranch_ptr is not None:
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


def _configure(op: str, r: torch.Tensor, *strides: int | None, **constants: float) -> tuple[tuple[int, ...], dict]:
    config, constants = constants_of(op, r, *strides, **constants)
    return _grid(config, r), constants | {"BLOCK_M": config.block_m}


def _grid(config: launch.LaunchConfig, r: torch.Tensor) -> tuple[int, int]:
    """Programs that share the rows, and blocks of columns."""
    n_cols = r.shape[-1]
    n_blocks = launch.cdiv(n_cols, config.block_n) if config.block_n else 1
    most = launch.cdiv(config.programs * launch.n_programs(r.device), n_blocks)
    return min(most, launch.cdiv(r.numel() // n_cols, config.block_m)), n_blocks


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _launch_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    statistics: torch.Tensor,
    eps: float = LAYER_NORM_EPS,
) -> None:
    """Write y and statistics, and residual if there is a branch."""
    if x.numel() == 0:
        return
    n_rows, n_cols, r = x.numel() // x.shape[-1], x.shape[-1], x if residual is None else residual
    x, stride_x = as_rows(x)
    branch, stride_branch = (None, None) if branch is None else as_rows(branch)
    tensors = (x, branch, *map(_contiguous, (branch_bias, weight, bias)), residual, y, statistics)
    numbers = n_rows, stride_x, stride_branch
    if n_cols > launch.WIDEST_TILE:
        wide_layer_norm.launch_forward(tensors, numbers, r, eps)
        return
    launch.run(
        _layer_norm_fwd_kernel,
        tensors,
        numbers,
        lambda: _configure("layer_norm", r, stride_x, stride_branch, EPS=eps),
        (n_cols, eps),
    )


def _launch_backward(
    dy: torch.Tensor,
    dresidual: torch.Tensor | None,
    r: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    dx: torch.Tensor,
    dbranch: torch.Tensor | None,
    *sums: torch.Tensor | None,
) -> None:
    """Write dx, and what is given of dbranch and of the sums dweight, dbias and dbranch_bias."""
    if r.numel() == 0:
        for total in sums:
            if total is not None:
                total.zero_()
        return
    n_rows, n_cols = r.numel() // r.shape[-1], r.shape[-1]
    n_programs, _ = _grid(launch.lookup("layer_norm_backward", r.device, r.element_size(), n_cols), r)
    partials = statistics.new_empty((2 if sums[2] is None else 3, n_programs, n_cols))
    r, stride_r = as_rows(r)
    dy, stride_dy = as_rows(dy)
    dresidual, stride_dresidual = (None, None) if dresidual is None else as_rows(dresidual)
    strides = stride_dy, stride_dresidual, stride_r
    weight, means = _contiguous(weight), None
    if n_cols > launch.WIDEST_TILE:
        means = wide_layer_norm.row_means(dy, r, statistics, weight, n_rows, stride_dy, stride_r)
    launch.run(
        _layer_norm_bwd_kernel,
        (dy, dresidual, r, statistics, weight, means, dx, dbranch, partials),
        (n_rows, *strides),
        lambda: _configure("layer_norm_backward", r, *strides, HAS_BRANCH_BIAS=sums[2] is not None),
        (n_cols, sums[2] is None),
    )
    column_sums.add_up(partials, *sums[: len(partials)])


def _empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of the shape of x."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def outputs(x, weight, bias, dtype, eps=LAYER_NORM_EPS) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of `forward`, empty."""
    return _empty(x, dtype), x.new_empty((2, *x.shape[:-1]), dtype=launch.wide_dtype(x.dtype))


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    eps: float = LAYER_NORM_EPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (y, statistics: mean and rstd). dtype is y's. Without weight or bias they are one or zero."""
    y, statistics = outputs(x, weight, bias, dtype)
    _launch_forward(x, None, None, weight, bias, None, y, statistics, eps)
    return y, statistics


def _sum_dtype(*addends: torch.Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in addends if x is not None))


def add_outputs(residual, branch, branch_bias, weight, bias, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The outputs of `add_forward`, empty."""
    r = _empty(residual, _sum_dtype(residual, branch, branch_bias))
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


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def empty_gradients(r, weight, residual_dtype, branch_dtype, bias_dtype, branch_bias_dtype=None) -> Gradients:
    """The outputs of `backward`, empty."""
    dbranch = r.new_empty(0) if branch_dtype == residual_dtype else _empty(r, branch_dtype)
    dtypes = (None if weight is None else weight.dtype, bias_dtype, branch_bias_dtype)
    sums = [r.new_empty(0 if dtype is None else r.shape[-1], dtype=dtype) for dtype in dtypes]
    return _empty(r, residual_dtype), dbranch, sums[0], sums[1], sums[2]


def backward(
    dy: torch.Tensor,
    dresidual: torch.Tensor | None,
    r: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    branch_bias_dtype: torch.dtype | None = None,
) -> Gradients:
    """Returns (dx, dbranch, dw, db, dbranch_bias). If dbranch has the dtype of dx, it is empty, and dx is the gradient
    of both. Gradients of vectors that are None, or have None for a dtype, are empty."""
    gradients = empty_gradients(r, weight, residual_dtype, branch_dtype, bias_dtype, branch_bias_dtype)
    asked = (branch_dtype != residual_dtype, weight is not None, bias_dtype is not None, branch_bias_dtype is not None)
    others = [x if is_asked else None for x, is_asked in zip(gradients[1:], asked, strict=True)]
    _launch_backward(dy, dresidual, r, statistics, weight, gradients[0], *others)
    return gradients


def _save(ctx, inputs, output):
    x, weight, bias, *_ = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.dtypes = x.dtype, x.dtype, None if bias is None else bias.dtype


def _differentiate(ctx, dy, *_):
    x, statistics, weight = ctx.saved_tensors  # torch.utils.checkpoint lets it be read once
    dx, _, dweight, dbias, _ = _layer_norm_backward(dy, None, x, statistics, weight, *ctx.dtypes)
    return dx, None if weight is None else dweight, None if ctx.dtypes[2] is None else dbias, None, None


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
normalise = register("layer_norm", forward, outputs, _save, _differentiate, visible=1)
"""(x, weight or None, bias or None, dtype of y, eps) -> y, for `kernels.nn`; arguments are not checked"""
_add_layer_norm = register("add_layer_norm", add_forward, add_outputs, _add_save, _add_differentiate, visible=2)


def _check_widths(x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            shapes = f"{tuple(x.shape)} and {tuple(vector.shape)}"
            raise ValueError(f"{name} is as wide as a row of x; got x and {name} of {shapes}")


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, biased variance, eps 1e-5 (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Args:
        x: (..., C) of any strides; fp32, fp16 or bf16 (fp64 for gradcheck).
        weight: (C,), any of these dtypes.
        bias: (C,), any of these dtypes.

    Returns:
        (..., C), contiguous: (x − mean)/√(var + eps)·weight + bias, computed in fp32 (fp64 for fp64). Its dtype is that
        of x, or under autocast autocast's.

    Raises:
        ValueError: weight or bias is not as wide as x, or a tensor has another dtype or device.
    """
    check("layer_norm", {"x": x, "weight": weight, "bias": bias})
    _check_widths(x, weight=weight, bias=bias)
    return normalise(x, weight, bias, autocast_dtype(x.device, x.dtype), LAYER_NORM_EPS)


def add_layer_norm(
    residual: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    branch_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch, and the bias that belongs to it, to the residual stream and normalise the sum, in one pass.

    Args:
        residual: (..., C) of any strides; fp32, fp16 or bf16 (fp64 for gradcheck).
        branch: same shape, any of these dtypes.
        weight: (C,), any of these dtypes.
        bias: (C,), any of these dtypes.
        branch_bias: (C,), any of these dtypes: the bias of the linear layer that made the branch; None for none.

    Returns:
        (residual + (branch + branch_bias), its layer_norm), both (..., C) and contiguous. The sum is rounded once, to
        the dtype of torch's addition, also under autocast. The second is bitwise identical to `layer_norm` of it.

    Raises:
        ValueError: residual and branch differ in shape, weight, bias or branch_bias is not as wide, or a tensor has
            another dtype or device.
    """
    if residual.shape != branch.shape:
        raise ValueError(f"residual and branch differ in shape: {tuple(residual.shape)} and {tuple(branch.shape)}")
    floats = {"residual": residual, "branch": branch, "weight": weight, "bias": bias}
    check("add_layer_norm", floats if branch_bias is None else floats | {"branch_bias": branch_bias})
    _check_widths(residual, weight=weight, bias=bias, branch_bias=branch_bias)
    # The dtype that the next matmul reads. Autocast would cast to it in a pass of its own.
    dtype = autocast_dtype(residual.device, _sum_dtype(residual, branch, branch_bias))
    return _add_layer_norm(residual, branch, branch_bias, weight, bias, dtype)


def forward_cost(
    n_rows: int, n_cols: int, residual: int, normed: int, weight: int, branch: int = 0, branch_bias: int = 0
) -> Cost:
    """Reads x, or residual, branch and branch_bias, weight and bias; writes y, mean, rstd and, with a branch, the sum.

    Args: n_rows rows of C = n_cols, and bytes per element of x or the residual stream, of y, of weight and bias, and of
        branch and branch_bias, 0 where there is none.
    """
    added = residual + branch if branch else 0
    element = residual + added + normed
    flops = 11 + bool(branch) + bool(branch_bias)
    vectors = n_cols * (2 * weight + branch_bias)
    return Cost(n_rows * (n_cols * element + 8) + vectors, flops * n_rows * n_cols)


def backward_cost(
    n_rows: int, n_cols: int, residual: int, normed: int, weight: int, branch: int = 0, branch_bias: int = 0
) -> Cost:
    """Reads dy, r, mean, rstd, weight and, with a branch, dresidual; writes dx, dw, db, dbranch_bias and, if its dtype
    is not that of dx, dbranch.

    Args: as in `forward_cost`.
    """
    added = residual if branch else 0
    if branch not in (0, residual):
        added += branch
    element = 2 * residual + added + normed
    flops = 14 + bool(branch) + bool(branch_bias)
    vectors = n_cols * (3 * weight + branch_bias)
    return Cost(n_rows * (n_cols * element + 8) + vectors, flops * n_rows * n_cols)
