"""LayerNorm over the last dimension (Ba et al. 2016, https://arxiv.org/abs/1607.06450), alone and behind an addition.

    r     = residual + branch                       add_layer_norm only; rounded to its dtype before it is normalised
    x_hat = (r − mean(r))·rstd,                     rstd = 1/√(var(r) + eps), biased variance
    y     = x_hat·weight + bias
    dr    = (wdy − mean(wdy) − x_hat·mean(wdy·x_hat))·rstd + dresidual,      wdy = dy·weight
    dw    = Σ dy·x_hat,   db = Σ dy                 over rows

A call has n_rows rows of n_cols columns. Both forwards are one kernel, so that layer_norm(r) has the bits of
add_layer_norm's second output. Saved for backward: r (for layer_norm its x) in its own dtype, mean and rstd of each row
in fp32, weight; not the branch and not y. A fixed number of programs shares the rows: weight and bias are read, and
partial sums of dw and db (fp32) written, once a program and not once a row; a second kernel adds the partial sums in
their order. Nothing is atomic: the same inputs give the same bits.

With R, Y and S bytes an element of r, y and branch, n_rows·n_cols·(R + Y) bytes move forward and n_rows·n_cols·(2R + Y)
backward; the addition costs R + S more forward, and backward R, and S where the branch's dtype is not r's. At about 11
and 14 FLOPs an element both are bound by memory. `forward_cost` and `backward_cost` have the small terms too.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import eager, launch
from kernels.cost import Cost

EPS = tl.constexpr(eager.LAYER_NORM_EPS)


@triton.jit
def _offsets(rows, stride, cols, ALIGN: tl.constexpr):
    """Offsets of a tile, (BLOCK_M, BLOCK_N). ALIGN divides the stride, and says how wide an access may be."""
    return tl.multiple_of(rows * stride, ALIGN)[:, None] + cols[None, :]


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    n_rows,
    stride_x,
    stride_branch,
    N_COLS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
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
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tl.arange(0, BLOCK_M) + tile * BLOCK_M).to(tl.int64)
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + _offsets(rows, stride_x, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        offs = rows[:, None] * N_COLS + cols[None, :]
        if HAS_BRANCH:
            branch_offs = _offsets(rows, stride_branch, cols, ALIGN)
            x += tl.load(branch_ptr + branch_offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
            residual = x.to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + offs, residual, mask=mask)
            x = residual.to(COMPUTE_DTYPE)
        rough_mean = tl.sum(x, 1) / N_COLS
        centred = tl.where(in_row[None, :], x - rough_mean[:, None], 0.0)
        # What rounding left in the mean: in a row of equal numbers it is all there is, and rstd is 1/√eps.
        rest = tl.sum(centred, 1) / N_COLS
        rstd = tl.rsqrt(tl.maximum(tl.sum(centred * centred, 1) / N_COLS - rest * rest, 0.0) + EPS)
        y = (centred - rest[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + rows, rough_mean + rest, mask=rows < n_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dresidual_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    dbranch_ptr,
    dweight_ptr,
    dbias_ptr,
    n_rows,
    stride_dy,
    stride_dresidual,
    stride_x,
    N_COLS: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    HAS_DBRANCH: tl.constexpr,
    ALIGN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(COMPUTE_DTYPE)
    # One sum a lane; rows meet in a fixed order after the loop.
    dweight = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), COMPUTE_DTYPE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=NUM_STAGES):
        rows = (tl.arange(0, BLOCK_M) + tile * BLOCK_M).to(tl.int64)
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + _offsets(rows, stride_x, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        dy = tl.load(dy_ptr + _offsets(rows, stride_dy, cols, ALIGN), mask=mask, other=0.0).to(COMPUTE_DTYPE)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        # Beyond the row x_hat is not 0, but dy is, and with it every product of the two.
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
    offs = tl.program_id(0) * N_COLS + cols
    tl.store(dweight_ptr + offs, tl.sum(dweight, 0), mask=in_row)
    tl.store(dbias_ptr + offs, tl.sum(dbias, 0), mask=in_row)


@triton.jit
def _layer_norm_partials_kernel(
    partial_dweight_ptr,
    partial_dbias_ptr,
    dweight_ptr,
    dbias_ptr,
    n_partials,
    N_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), partial_dweight_ptr.dtype.element_ty)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), partial_dbias_ptr.dtype.element_ty)
    for start in range(0, n_partials, BLOCK_M):
        rows = tl.arange(0, BLOCK_M) + start
        offs = rows[:, None] * N_COLS + cols[None, :]
        mask = (rows < n_partials)[:, None] & (cols < N_COLS)[None, :]
        dweight += tl.load(partial_dweight_ptr + offs, mask=mask, other=0.0)
        dbias += tl.load(partial_dbias_ptr + offs, mask=mask, other=0.0)
    tl.store(dweight_ptr + cols, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=cols < N_COLS)
    tl.store(dbias_ptr + cols, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=cols < N_COLS)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., C) to (n_rows, C), whose rows are contiguous; a view where the strides allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch_constants(op: str, r: torch.Tensor, *rows: torch.Tensor | None) -> tuple[int, dict]:
    """How many programs share the rows of r, and what `op`, which reads them and others, is compiled with."""
    row = launch.lookup(op, r.device, r.element_size(), r.shape[-1])
    constants = {
        "N_COLS": r.shape[-1],
        "ALIGN": math.gcd(16, *(tensor.stride(0) for tensor in rows if tensor is not None)),
        "COMPUTE_DTYPE": launch.compute_dtype(r.dtype),
        "BLOCK_M": row.block_m,
        "BLOCK_N": triton.next_power_of_2(r.shape[-1]),
        "NUM_STAGES": row.num_stages,
        "num_warps": row.num_warps,
    }
    n_tiles = triton.cdiv(r.numel() // r.shape[-1], row.block_m)
    return min(launch.n_programs(r.device), n_tiles), constants


def _launch_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fill y, mean and rstd, and with a branch residual."""
    if x.numel() == 0:
        return
    has_branch = branch is not None
    x, branch = _as_rows(x), _as_rows(branch) if has_branch else None
    n_programs, constants = _launch_constants("layer_norm", residual if has_branch else x, x, branch)
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(n_programs,)](
            x,
            branch,
            weight.contiguous(),
            bias.contiguous(),
            residual,
            y,
            mean,
            rstd,
            len(x),
            x.stride(0),
            branch.stride(0) if has_branch else None,
            HAS_BRANCH=has_branch,
            **constants,
        )


def _launch_backward(
    dy: torch.Tensor,
    dresidual: torch.Tensor | None,
    r: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    dbranch: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> None:
    """Fill dx, dweight and dbias, and dbranch where it has elements."""
    if r.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return
    has_dresidual, has_dbranch = dresidual is not None, dbranch.numel() > 0
    r, dy, dresidual = _as_rows(r), _as_rows(dy), _as_rows(dresidual) if has_dresidual else None
    n_programs, constants = _launch_constants("layer_norm_backward", r, r, dy, dresidual)
    partials = torch.empty(2, n_programs, r.shape[1], dtype=mean.dtype, device=r.device)
    row = launch.lookup("layer_norm_partials", r.device, partials.element_size())
    with torch.cuda.device_of(r):
        _layer_norm_bwd_kernel[(n_programs,)](
            dy,
            dresidual,
            r,
            mean,
            rstd,
            weight.contiguous(),
            dx,
            dbranch if has_dbranch else None,
            partials[0],
            partials[1],
            len(r),
            dy.stride(0),
            dresidual.stride(0) if has_dresidual else None,
            r.stride(0),
            HAS_DRESIDUAL=has_dresidual,
            HAS_DBRANCH=has_dbranch,
            **constants,
        )
        _layer_norm_partials_kernel[(triton.cdiv(r.shape[1], row.block_n),)](
            partials[0],
            partials[1],
            dweight,
            dbias,
            n_programs,
            N_COLS=r.shape[1],
            BLOCK_M=row.block_m,
            BLOCK_N=row.block_n,
            num_warps=row.num_warps,
        )


def _empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, whatever the strides of x are."""
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _outputs(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    statistics = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=statistics, device=x.device) for _ in range(2))
    return _empty(x, dtype), mean, rstd


@torch.library.custom_op("tritongpt::layer_norm", mutates_args=())
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd); dtype is y's"""
    y, mean, rstd = _outputs(x, weight, bias, dtype)
    _launch_forward(x, None, weight, bias, None, y, mean, rstd)
    return y, mean, rstd


_layer_norm.register_fake(_outputs)


def _add_outputs(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r = _empty(residual, torch.promote_types(residual.dtype, branch.dtype))
    return r, *_outputs(r, weight, bias, dtype)


@torch.library.custom_op("tritongpt::add_layer_norm", mutates_args=())
def _add_layer_norm(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual + branch, y, mean, rstd); dtype is y's"""
    r, y, mean, rstd = _add_outputs(residual, branch, weight, bias, dtype)
    _launch_forward(residual, branch, weight, bias, r, y, mean, rstd)
    return r, y, mean, rstd


_add_layer_norm.register_fake(_add_outputs)


def _gradients(
    dy: torch.Tensor,
    dresidual: torch.Tensor | None,
    r: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbranch = r.new_empty(0) if branch_dtype == residual_dtype else _empty(r, branch_dtype)
    return _empty(r, residual_dtype), dbranch, _empty(weight, weight.dtype), _empty(weight, bias_dtype)


@torch.library.custom_op("tritongpt::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: torch.Tensor,
    dresidual: torch.Tensor | None,
    r: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dbranch, dw, db); dbranch is empty where its dtype is that of dx, which then is the gradient of both"""
    dx, dbranch, dweight, dbias = _gradients(
        dy, dresidual, r, mean, rstd, weight, residual_dtype, branch_dtype, bias_dtype
    )
    _launch_backward(dy, dresidual, r, mean, rstd, weight, dx, dbranch, dweight, dbias)
    return dx, dbranch, dweight, dbias


_layer_norm_backward.register_fake(_gradients)


def _save(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight)
    ctx.dtypes = x.dtype, x.dtype, bias.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx, dy, dmean, drstd):
    dx, _, dweight, dbias = _layer_norm_backward(dy, None, *ctx.saved_tensors, *ctx.dtypes)
    return dx, dweight, dbias, None


def _add_save(ctx, inputs, output):
    residual, branch, weight, bias, _ = inputs
    r, _, mean, rstd = output
    ctx.save_for_backward(r, mean, rstd, weight)
    ctx.dtypes = residual.dtype, branch.dtype, bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    # Nobody reads the residual stream behind the last LayerNorm: no zeros are made for its gradient.
    ctx.set_materialize_grads(False)


def _add_differentiate(ctx, dresidual, dy, dmean, drstd):
    residual_dtype, branch_dtype, _ = ctx.dtypes
    if dy is None:
        gradients = (None if dresidual is None else dresidual.to(dtype) for dtype in (residual_dtype, branch_dtype))
        return *gradients, None, None, None
    dx, dbranch, dweight, dbias = _layer_norm_backward(dy, dresidual, *ctx.saved_tensors, *ctx.dtypes)
    return dx, dx if branch_dtype == residual_dtype else dbranch, dweight, dbias, None


_layer_norm.register_autograd(_differentiate, setup_context=_save)
_add_layer_norm.register_autograd(_add_differentiate, setup_context=_add_save)


def _normed_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the matmul behind it reads: autocast does not reach custom ops, and would cast in a pass of its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _check_shapes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if not weight.shape == bias.shape == x.shape[-1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"weight and bias are as wide as a row of x; got x, weight and bias of {shapes}")


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last dimension, biased variance, eps 1e-5 (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Args:
        x: (..., C) of any strides, C at most 16384; fp32, fp16 or bf16 (fp64 for gradcheck).
        weight: (C,), of whichever of these dtypes.
        bias: (C,), of whichever of these dtypes.

    Returns:
        (..., C), contiguous: (x − mean)/√(var + eps)·weight + bias, computed in fp32. Its dtype is that of x, and under
        autocast autocast's.

    Raises:
        ValueError: weight or bias is not as wide as x, or x is too wide.
    """
    _check_shapes(x, weight, bias)
    return _layer_norm(x, weight, bias, _normed_dtype(x, x.dtype))[0]


def add_layer_norm(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass.

    Args:
        residual: (..., C) of any strides, C at most 16384; fp32, fp16 or bf16 (fp64 for gradcheck).
        branch: of the same shape and of whichever of these dtypes.
        weight: (C,), of whichever of these dtypes.
        bias: (C,), of whichever of these dtypes.

    Returns:
        (residual + branch, layer_norm(residual + branch)), both (..., C) and contiguous. The sum has the dtype that
        torch's addition gives it, also under autocast; the second is to the bit what `layer_norm` makes of the first.

    Raises:
        ValueError: residual and branch differ in shape, weight or bias is not as wide, or C is too large.
    """
    if residual.shape != branch.shape:
        raise ValueError(f"residual and branch differ in shape: {tuple(residual.shape)} and {tuple(branch.shape)}")
    _check_shapes(residual, weight, bias)
    dtype = _normed_dtype(residual, torch.promote_types(residual.dtype, branch.dtype))
    return _add_layer_norm(residual, branch, weight, bias, dtype)[:2]


def forward_cost(
    n_rows: int,
    n_cols: int,
    residual_itemsize: int,
    normed_itemsize: int,
    weight_itemsize: int,
    branch_itemsize: int = 0,
) -> Cost:
    """x, or residual and branch, weight and bias are read; y, mean, rstd, and with a branch the sum, are written.

    Args:
        n_rows: rows.
        n_cols: C.
        residual_itemsize: bytes of an element of x, or of the residual stream.
        normed_itemsize: of y.
        weight_itemsize: of weight and of bias.
        branch_itemsize: of branch; 0 is layer_norm, which has none.
    """
    added = residual_itemsize + branch_itemsize if branch_itemsize else 0
    element = residual_itemsize + added + normed_itemsize
    flops = 12 if branch_itemsize else 11
    return Cost(n_rows * (n_cols * element + 8) + 2 * n_cols * weight_itemsize, flops * n_rows * n_cols)


def backward_cost(
    n_rows: int,
    n_cols: int,
    residual_itemsize: int,
    normed_itemsize: int,
    weight_itemsize: int,
    branch_itemsize: int = 0,
) -> Cost:
    """dy, r, mean, rstd, weight, and with a branch dresidual, are read; dx, dw, db, and dbranch where its dtype is not
    that of dx, are written.

    Args: as of `forward_cost`.
    """
    added = residual_itemsize if branch_itemsize else 0
    if branch_itemsize not in (0, residual_itemsize):
        added += branch_itemsize
    element = 2 * residual_itemsize + added + normed_itemsize
    flops = 15 if branch_itemsize else 14
    return Cost(n_rows * (n_cols * element + 8) + 3 * n_cols * weight_itemsize, flops * n_rows * n_cols)
