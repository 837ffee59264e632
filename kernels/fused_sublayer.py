"""Half a block of GPT-2 as one op: the kernels, the matmuls between them, and all that they need not do twice.

    r = residual + (branch + branch_bias),   normed = LayerNorm(r),   h = normed·Wᵀ + b
    x = attention(h) or GELU(h),             out = x·W_outᵀ, without its bias, which the next LayerNorm adds

`kernels/sublayer.py` composes the same of single ops. One op saves passes over memory: the gradient of each bias is a
column sum of a gradient that a backward kernel holds in registers, dh in those of attention and GELU, dbranch in that
of LayerNorm. Gradients of matrices are written in the dtype of the parameter, by the matmul. And it saves host time: a
single autograd node makes 7 calls of ops.

Saved for backward, per token: 6·C elements by attention (r, normed, h, x) and 10·C by the MLP, less normed (C) at
recompute level 2, and x (4·C) of the MLP at level 1. Results and gradients are bitwise identical at all levels.
"""

import torch
import torch.nn.functional as F

from kernels import attention, gelu, layer_norm
from kernels.dispatch import FLOATS, autocast_dtype, register
from kernels.sublayer import Affine, Stream, no_wider

T = torch.Tensor
Nine = tuple[T, T, T, T, T, T, T, T, T]


def fused(
    stream: Stream,
    norm: Affine,
    linear: Affine,
    out: Affine,
    n_head: int | None,
    level: int,
    leave_bias: bool,
) -> Stream | None:
    """Half a block; n_head is None for the MLP. `Ops.attention_sublayer` documents the other arguments.

    Returns:
        The stream after it. None if the ops have to be called one by one: for dtypes that are mixed otherwise than by
        autocast, and for arguments that an op refuses, whose error messages are better.
    """
    residual, branch, branch_bias = stream
    tensors = [t for t in (*stream, *norm, *linear, *out) if t is not None]
    device, C = residual.device, residual.shape[-1]
    dtype, device_type = autocast_dtype(device, residual.dtype), device.type
    is_cast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtypes = {t.dtype for t in tensors}
    if not (dtypes <= {torch.float32, dtype} if is_cast else len(dtypes) == 1 and dtype in FLOATS):
        return None
    wide = 4 * C if n_head is None else 3 * C
    shapes = [(C,), (C,), (wide, C), (wide,), (C, 4 * C if n_head is None else C), (C,)]
    if [t.shape for t in (*norm, *linear, *out)] != shapes or any(t.device != device for t in tensors):
        return None
    if residual.dim() != 3 or (branch is not None and branch.shape != residual.shape):
        return None
    if n_head is not None and (n_head < 1 or C % n_head or C // n_head > attention.MAX_HEAD_DIM):
        return None
    if branch is not None and is_cast and branch.dtype != dtype:
        branch = branch.to(dtype)  # as it is where a linear layer made it
    out_weight, out_bias = out
    parameters = *norm, *linear, out_weight, None if leave_bias else out_bias
    suspends = is_cast and not torch.compiler.is_compiling()  # _forward makes every cast; autocast would look for more
    if suspends:
        torch.set_autocast_enabled(device_type, False)
    try:
        r, branch = _sublayer(residual, branch, branch_bias, *parameters, n_head, level, dtype)
    finally:
        if suspends:
            torch.set_autocast_enabled(device_type, True)
    residual = _through(residual, r) if stream.branch is None else r
    return Stream(residual, branch, out_bias if leave_bias else None)


def _forward(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    branch_bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    n_head: int | None,
    level: int,
    dtype: torch.dtype,
) -> Nine:
    """(r, out, normed, statistics, h, x, lse, W and W_out in `dtype`). Empty where there is none or it is an input;
    such an r is a placeholder."""
    if branch is None:
        r = _placeholder(residual)
        normed, statistics = layer_norm.forward(residual, norm_weight, norm_bias, dtype)
    else:
        summed = None if branch_bias is None else no_wider(branch_bias, residual, branch)
        r, normed, statistics = layer_norm.add_forward(residual, branch, summed, norm_weight, norm_bias, dtype)
    cast, cast_out = (w if w.dtype == dtype else w.to(dtype) for w in (weight, out_weight))
    h = F.linear(normed, cast, bias.to(dtype))
    x, lse = (gelu.forward(h), _nothing(h)) if n_head is None else attention.packed_forward(h, n_head)
    out = F.linear(x, cast_out, None if out_bias is None else out_bias.to(dtype))
    normed = _nothing(h) if level >= 2 else normed
    x = _nothing(h) if n_head is None and level >= 1 else x
    # An output that is an input would share memory with it.
    cast, cast_out = (_nothing(h) if w16 is w else w16 for w, w16 in ((weight, cast), (out_weight, cast_out)))
    return r, out, normed, statistics, h, x, lse, cast, cast_out


def _nothing(x: torch.Tensor) -> torch.Tensor:
    """A new one for each output: those of an op do not share memory."""
    return x.new_empty(0)


def _is_nothing(x: torch.Tensor) -> bool:
    """An empty batch has its dimensions."""
    return x.dim() == 1


def _placeholder(x: torch.Tensor) -> torch.Tensor:
    """Of the shape of x, without its memory."""
    return x.new_empty(1).expand(x.shape)


class _Through(torch.autograd.Function):
    """x, whose gradient is that of `placeholder`. The op that made the placeholder adds it to its own gradient of x, in
    a pass that LayerNorm's backward makes anyway; autograd would need another one."""

    @staticmethod
    def forward(x: torch.Tensor, placeholder: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return None, dy


def _fake(residual, branch, branch_bias, *rest):
    norm_weight, norm_bias, weight, _, out_weight, _, n_head, level, dtype = rest
    norm = norm_weight, norm_bias, dtype
    if branch is None:
        r, (normed, statistics) = _placeholder(residual), layer_norm.outputs(residual, *norm)
    else:
        r, normed, statistics = layer_norm.add_outputs(residual, branch, None, *norm)  # the bias widens nothing
    h, x, out = (normed.new_empty((*residual.shape[:-1], w)) for w in (weight.shape[0], *out_weight.t().shape))
    return (
        *(r, out, _nothing(h) if level >= 2 else normed, statistics, h),
        _nothing(h) if n_head is None and level >= 1 else x,
        _nothing(h) if n_head is None else attention.packed_outputs(h, n_head)[1],
        *(_nothing(h) if w.dtype == dtype else torch.empty_like(w, dtype=dtype) for w in (weight, out_weight)),
    )


def _save(ctx, inputs, output):
    residual, branch, branch_bias, *parameters, ctx.n_head, _, _ = inputs
    r, _, *saved = output
    ctx.dtypes = residual.dtype, None if branch is None else branch.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual if branch is None else r, *saved, branch_bias, *parameters)


def _differentiate(ctx, dr, dout, *_):
    if dr is None and dout is None:
        return (None,) * 12
    r, *saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(r, dtype=saved[2].dtype)
    needed = sum(is_needed << i for i, is_needed in enumerate(ctx.needs_input_grad[:9]))
    gradients = _sublayer_backward(dout, dr, r, *saved, *ctx.dtypes, ctx.n_head, needed)
    dresidual, dbranch, *others = gradients
    if ctx.dtypes[1] == ctx.dtypes[0]:
        dbranch = dresidual
    gradients = (dresidual, dbranch, *others)
    return *(g if n else None for g, n in zip(gradients, ctx.needs_input_grad, strict=False)), None, None, None


def _backward(
    dout: torch.Tensor,
    dr: torch.Tensor | None,
    r: torch.Tensor,
    normed: torch.Tensor,
    statistics: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    lse: torch.Tensor,
    cast: torch.Tensor,
    cast_out: torch.Tensor,
    branch_bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    n_head: int | None,
    needed: int,
) -> Nine:
    """Gradients of the first nine arguments of `_forward`. Empty where bit i of `needed` is 0, and for a branch of the
    residual's dtype, since its gradient is the same."""
    cast, cast_out = (w if _is_nothing(c) else c for c, w in ((cast, weight), (cast_out, out_weight)))
    if _is_nothing(normed):
        normed, _ = layer_norm.forward(r, norm_weight, norm_bias, h.dtype)
    if _is_nothing(x):
        x = gelu.forward(h)
    dout = dout.flatten(0, -2)
    dx = dout.mm(cast_out)
    dout_weight = _weight_gradient(dout, x.flatten(0, -2), out_weight.dtype) if needed >> 7 & 1 else _nothing(r)
    dout_bias = dout.sum(0, dtype=out_bias.dtype) if needed >> 8 & 1 and out_bias is not None else _nothing(r)
    dbias = torch.empty_like(bias)
    if n_head is None:
        dh = gelu.backward_with_dbias(dx, h.flatten(0, -2), dbias)
    else:
        dh = attention.packed_backward(dx.view(x.shape), h, x, lse, n_head, dbias).flatten(0, -2)
    dnormed = dh.mm(cast).view(r.shape)
    dweight = _weight_gradient(dh, normed.flatten(0, -2), weight.dtype) if needed >> 5 & 1 else _nothing(r)
    dresidual, dbranch, dnorm_weight, dnorm_bias, dbranch_bias = layer_norm.backward(
        *(dnormed, dr, r, statistics, norm_weight, residual_dtype, branch_dtype or residual_dtype, norm_bias.dtype),
        None if branch_bias is None else branch_bias.dtype,
    )
    return dresidual, dbranch, dbranch_bias, dnorm_weight, dnorm_bias, dweight, dbias, dout_weight, dout_bias


def _backward_fake(dout, dr, r, normed, statistics, h, x, lse, cast, cast_out, branch_bias, *rest):
    norm_weight, norm_bias, weight, bias, out_weight, out_bias, residual_dtype, branch_dtype, _, needed = rest
    dtypes = residual_dtype, branch_dtype or residual_dtype, norm_bias.dtype
    gradients = layer_norm.empty_gradients(r, norm_weight, *dtypes, None if branch_bias is None else branch_bias.dtype)
    dresidual, dbranch, dnorm_weight, dnorm_bias, dbranch_bias = gradients
    of_linears = (
        torch.empty_like(parameter, memory_format=torch.contiguous_format)
        if parameter is not None and (needed >> i & 1 or parameter is bias)
        else _nothing(r)
        for i, parameter in ((5, weight), (6, bias), (7, out_weight), (8, out_bias))
    )
    return dresidual, dbranch, dbranch_bias, dnorm_weight, dnorm_bias, *of_linears


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dyᵀ·x in `dtype`, which may be wider than theirs: then it is never rounded to 16 bits."""
    if dtype == dy.dtype:
        return dy.t().mm(x)
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return dy.t().to(dtype).mm(x.to(dtype))  # on a CPU, torch's matmuls take one dtype


_through = _Through.apply
_sublayer_backward = register("sublayer_backward", _backward, _backward_fake)
_sublayer = register("sublayer", _forward, _fake, _save, _differentiate, visible=2)
