"""A block of GPT-2 as one autograd node, for eager mode: the kernels, and the matmuls between them, in one function.

    r₁ = residual + branch,   branch₁ = attention(LayerNorm₁(r₁)·W_attnᵀ + b_attn)·W_projᵀ + b_proj
    r₂ = r₁ + branch₁,        branch₂ = GELU(LayerNorm₂(r₂)·W_fcᵀ + b_fc)·W_outᵀ + b_out

It computes the same as the ops called one by one, in two thirds of the host time: on small batches a GPU would wait
for Python. Results and gradients are bitwise identical, with one exception: the gradient of a first residual in 16 bits
is rounded once instead of twice. It is not an op: whatever has to see the ops (torch.compile, dispatch modes,
torch.func, hooks on modules) gets them one by one.

Saved for backward, per token and layer: 16·C elements, including r₁ and r₂; 12·C without GELU's output, and 10·C also
without those of the LayerNorms (recomputation: Chen et al. 2016, https://arxiv.org/abs/1604.06174; llm.c's -r).
"""

import torch
import torch.nn.functional as F

from kernels import attention, gelu, layer_norm
from kernels.dispatch import FLOATS, autocast_dtype, unasked_apply, unseen


def block(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    params: tuple[torch.nn.Parameter, ...],
    n_head: int,
    recompute: int = 0,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run a block.

    Args:
        residual: (B, T, C), fp32, fp16 or bf16.
        branch: (B, T, C), to be added to residual; None for nothing.
        params: weight and bias, in this order, of ln_1 (C,), c_attn (3C, C), attn.c_proj (C, C), ln_2 (C,), c_fc
            (4C, C) and mlp.c_proj (C, 4C). Autocast casts matrices and their biases.
        n_head: number of heads.
        recompute: 1 recomputes GELU in backward, 2 also LayerNorms.

    Returns:
        (r₂, branch₂), both (B, T, C); their sum is the result of the block. None if the ops have to be called one by
        one, also for arguments that they refuse: their error messages are better.
    """
    tensors = (residual, *params) if branch is None else (residual, branch, *params)
    if not (torch.is_grad_enabled() and unseen(tensors)):
        return None
    device, C = residual.device, residual.shape[-1]
    autocast = torch.is_autocast_enabled(device.type)
    dtype = autocast_dtype(device, torch.float32) if autocast else residual.dtype
    dtypes = {t.dtype for t in tensors}
    uniform = dtypes <= {torch.float32, dtype} if autocast else len(dtypes) == 1 and dtype in FLOATS
    if not uniform or any(t.device != device for t in tensors):
        return None
    norms_fit = all(params[i].shape == (C,) for i in (0, 1, 6, 7)) and (
        branch is None or branch.shape == residual.shape
    )
    if not norms_fit or C % n_head or C // n_head > attention.MAX_HEAD_DIM:
        return None
    torch.set_autocast_enabled(device.type, False)  # _forward makes every cast
    try:
        return _apply(residual, branch, dtype, n_head, recompute, *params)
    finally:
        torch.set_autocast_enabled(device.type, autocast)


def _forward(ctx, residual, branch, dtype, n_head, recompute, *params):
    ln_1, ln_1_bias, attn, attn_bias, proj, proj_bias, ln_2, ln_2_bias, fc, fc_bias, out, out_bias = params
    attn, proj, fc, out = (w if w.dtype == dtype else w.to(dtype) for w in (attn, proj, fc, out))
    attn_bias, proj_bias, fc_bias, out_bias = (
        b if b.dtype == dtype else b.to(dtype) for b in (attn_bias, proj_bias, fc_bias, out_bias)
    )
    B, T, C = residual.shape
    rows = residual.reshape(-1, C)
    if branch is None:
        r1 = rows
        normed1, statistics1 = layer_norm.forward(r1, ln_1, ln_1_bias, dtype)
    else:
        r1, normed1, statistics1 = layer_norm.add_forward(rows, branch.reshape(-1, C), None, ln_1, ln_1_bias, dtype)
    qkv = F.linear(normed1, attn, attn_bias).view(B, T, 3 * C)
    heads, lse = attention.packed_forward(qkv, n_head)
    heads = heads.view(-1, C)
    branch1 = F.linear(heads, proj, proj_bias)
    r2, normed2, statistics2 = layer_norm.add_forward(r1, branch1, None, ln_2, ln_2_bias, dtype)
    h = F.linear(normed2, fc, fc_bias)
    activated = gelu.forward(h)

    ctx.n_head = n_head
    ctx.recompute = recompute
    ctx.dtypes = residual.dtype, None if branch is None else branch.dtype, [p.dtype for p in params]
    ctx.save_for_backward(
        *(r1, statistics1, ln_1, attn, qkv, heads, lse, proj, r2, statistics2, ln_2, fc, h, out),
        *([activated] if recompute < 1 else []),
        *([normed1, normed2] if recompute < 2 else [ln_1_bias, ln_2_bias]),
    )
    return r2.view(B, T, C), F.linear(activated, out, out_bias).view(B, T, C)


def _backward(ctx, dr2, dbranch2):
    if torch.is_grad_enabled():
        raise RuntimeError("a block cannot be differentiated twice; for create_graph=True use eager")
    r1, statistics1, ln_1, attn, qkv, heads, lse, proj, r2, statistics2, ln_2, fc, h, out, *rest = ctx.saved_tensors
    residual_dtype, branch_dtype, param_dtypes = ctx.dtypes
    shape = dr2.shape
    C = shape[-1]
    dr2, dbranch2 = dr2.reshape(-1, C), dbranch2.reshape(-1, C)
    activated = gelu.forward(h) if ctx.recompute >= 1 else rest.pop(0)
    if ctx.recompute >= 2:
        (normed1, _), (normed2, _) = (
            layer_norm.forward(r, weight, bias, h.dtype)
            for r, weight, bias in ((r1, ln_1, rest[0]), (r2, ln_2, rest[1]))
        )
    else:
        normed1, normed2 = rest

    needed = ctx.needs_input_grad[5:]
    dactivated, dout, dout_bias = _linear_backward(dbranch2, activated, out, needed[10:])
    dh = gelu.backward(dactivated, h)
    dnormed2, dfc, dfc_bias = _linear_backward(dh, normed2, fc, needed[8:])
    dr1, dbranch1, dln_2, dln_2_bias, _ = layer_norm.backward(
        dnormed2, dr2, r2, statistics2, ln_2, r1.dtype, h.dtype, param_dtypes[7]
    )
    dheads, dproj, dproj_bias = _linear_backward(dr1 if r1.dtype == h.dtype else dbranch1, heads, proj, needed[4:])
    dqkv = attention.packed_backward(dheads.view(shape), qkv, heads.view(shape), lse, ctx.n_head)
    dnormed1, dattn, dattn_bias = _linear_backward(dqkv.view(-1, 3 * C), normed1, attn, needed[2:])
    dresidual, dbranch, dln_1, dln_1_bias, _ = layer_norm.backward(
        dnormed1, dr1, r1, statistics1, ln_1, residual_dtype, branch_dtype or residual_dtype, param_dtypes[1]
    )
    of_params = (
        *(dln_1, dln_1_bias, dattn, dattn_bias, dproj, dproj_bias),
        *(dln_2, dln_2_bias, dfc, dfc_bias, dout, dout_bias),
    )
    dresidual = dresidual.view(shape)
    return (
        dresidual,
        None if branch_dtype is None else dresidual if branch_dtype == residual_dtype else dbranch.view(shape),
        None,
        None,
        None,
        *(
            g if g is None or g.dtype == dtype else g.to(dtype)
            for g, dtype in zip(of_params, param_dtypes, strict=True)
        ),
    )


def _linear_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, ...]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dweight, dbias), bitwise identical to autograd's; None if the first or second of `needed` is False."""
    return dy.mm(weight), dy.t().mm(x) if needed[0] else None, dy.sum(0) if needed[1] else None


class _Block(torch.autograd.Function):
    forward = staticmethod(_forward)
    backward = staticmethod(_backward)


_apply = unasked_apply(_Block)
