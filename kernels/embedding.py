"""Token embedding plus position embedding (Radford et al. 2019, GPT-2), gathered and added in one pass.

    y[b, t]      = token_weight[idx[b, t]] + position_weight[t]
    dtoken[v]    = Σ dy[b, t] over idx[b, t] = v
    dposition[t] = Σ dy[b, t] over b,           0 beyond T

idx: (B, T) integers; token_weight (V, C), position_weight (block_size, C), y (B, T, C), added in fp32. Saved for
backward: idx. A program takes several sequences at one position and reads the row of position_weight once for all of
them. With I, E and P bytes per element of idx, of token_weight and y, and of position_weight, a call moves
B·T·(I + 2·C·E) + T·C·P bytes, with one FLOP per element of y.

Backward is torch's, which is deterministic. Its CUDA kernels sort the ids and add the rows of each id in that order
(for up to 3072 ids, one warp adds the rows of an id one by one); the sum over the batch has no atomics either. It moves
at least B·T·(I + C·E) + (V + block_size)·C·E bytes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import launch
from kernels.cost import Cost
from kernels.dispatch import check, register


@triton.jit
def _embedding_fwd_kernel(
    idx_ptr,
    token_weight_ptr,
    position_weight_ptr,
    y_ptr,
    is_valid_ptr,
    B,
    T,
    C,
    V,
    stride_ib,
    stride_it,
    stride_tv,
    stride_pt,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    idx = tl.load(idx_ptr + offs_b * stride_ib + t * stride_it, mask=offs_b < B, other=0).to(tl.int64)
    in_vocab = (idx >= 0) & (idx < V)
    tl.store(is_valid_ptr + tl.zeros_like(idx), 0, mask=~in_vocab)
    mask = (offs_b < B)[:, None] & (cols < C)[None, :]
    position = tl.load(position_weight_ptr + t * stride_pt + cols, mask=cols < C, other=0.0).to(COMPUTE_DTYPE)
    token_ptrs = token_weight_ptr + (idx * stride_tv)[:, None] + cols[None, :]
    token = tl.load(token_ptrs, mask=mask & in_vocab[:, None], other=0.0)
    y = token.to(COMPUTE_DTYPE) + position[None, :]
    y_offs = ((offs_b * T + t) * C)[:, None] + cols[None, :]
    tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def _output(
    idx: torch.Tensor, token_weight: torch.Tensor, position_weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(*idx.shape, token_weight.shape[1], dtype=dtype, device=idx.device)


def _forward(
    idx: torch.Tensor, token_weight: torch.Tensor, position_weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    y = _output(idx, token_weight, position_weight, dtype)
    if y.numel() == 0:
        return y
    token_weight, position_weight = (w if w.stride(1) == 1 else w.contiguous() for w in (token_weight, position_weight))
    is_valid = torch.ones((), dtype=torch.int32, device=y.device)
    B, T, C = y.shape
    launch.run(
        _embedding_fwd_kernel,
        (idx, token_weight, position_weight, y, is_valid),
        (B, T, C, len(token_weight), *idx.stride(), token_weight.stride(0), position_weight.stride(0)),
        lambda: _configure(y, torch.promote_types(token_weight.dtype, position_weight.dtype)),
    )
    launch.require(is_valid, f"a token id is not in [0, {len(token_weight)})")
    return y


def _configure(y: torch.Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], dict]:
    B, T, C = y.shape
    config = launch.lookup("embedding", y.device, y.element_size(), C)
    constants = {
        "COMPUTE_DTYPE": launch.compute_dtype(dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (T, launch.cdiv(B, config.block_m), launch.cdiv(C, config.block_n)), constants


def _gradients(dy, idx, vocab_size, block_size, token_dtype, position_dtype, needs_dtoken, needs_dposition):
    """`_backward` for fake tensors."""
    C = dy.shape[-1]
    dtoken = dy.new_empty((vocab_size, C) if needs_dtoken else 0, dtype=token_dtype)
    return dtoken, dy.new_empty((block_size, C) if needs_dposition else 0, dtype=position_dtype)


def _backward(
    dy: torch.Tensor,
    idx: torch.Tensor,
    vocab_size: int,
    block_size: int,
    token_dtype: torch.dtype,
    position_dtype: torch.dtype,
    needs_dtoken: bool,
    needs_dposition: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dtoken, dposition), empty if not needed. An op of its own: torch.compile would generate atomics for dtoken."""
    dtoken, dposition = dy.new_empty(0, dtype=token_dtype), dy.new_empty(0, dtype=position_dtype)
    if needs_dtoken:
        ids = idx if idx.dtype in (torch.int32, torch.int64) else idx.long()
        dtoken = torch.ops.aten.embedding_dense_backward(dy.to(token_dtype), ids, vocab_size, -1, False)
    if needs_dposition:
        dposition = dy.sum(0, dtype=position_dtype)
        if idx.shape[1] < block_size:
            dposition = F.pad(dposition, (0, 0, 0, block_size - idx.shape[1]))
    return dtoken, dposition


def _save(ctx, inputs, output):
    idx, token_weight, position_weight, _ = inputs
    ctx.save_for_backward(idx)
    ctx.sizes = len(token_weight), len(position_weight), token_weight.dtype, position_weight.dtype


def _differentiate(ctx, dy):
    (idx,) = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:3]
    gradients = _embedding_backward(dy, idx, *ctx.sizes, *needs)
    return None, *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None


_embedding_backward = register("embedding_backward", _backward, _gradients)
_embedding = register("embedding", _forward, _output, _save, _differentiate)


def embedding(
    idx: torch.Tensor, token_weight: torch.Tensor, position_weight: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Token embedding plus position embedding.

    Args:
        idx: (B, T) token ids: integers of any width and strides.
        token_weight: (V, C); fp32, fp16 or bf16 (fp64 for gradcheck).
        position_weight: (block_size, C), block_size >= T; any of these dtypes.
        dtype: of the result; None for the wider of the weights' dtypes, also under autocast.

    Returns:
        (B, T, C), contiguous: token_weight[idx] + position_weight[:T], rounded once.

    Raises:
        ValueError: T is larger than block_size, the weights differ in width, or a tensor has another dtype or device.
        IndexError: an id is outside [0, V), on a CPU. On a GPU a device-side assertion fails instead, which raises at
            the next synchronisation.
    """
    check("embedding", {"token_weight": token_weight, "position_weight": position_weight}, {"idx": idx})
    if idx.shape[1] > len(position_weight):
        raise ValueError(f"a sequence of {idx.shape[1]} tokens is longer than block_size {len(position_weight)}")
    if token_weight.shape[1] != position_weight.shape[1]:
        raise ValueError(
            f"token_weight is {token_weight.shape[1]} wide, and position_weight {position_weight.shape[1]}"
        )
    dtype = dtype or torch.promote_types(token_weight.dtype, position_weight.dtype)
    return _embedding(idx, token_weight, position_weight, dtype)


def forward_cost(B: int, T: int, C: int, itemsize: int, idx_itemsize: int = 8) -> Cost:
    """Reads a row of token_weight and writes one of y per id; reads T rows of position_weight."""
    return Cost(B * T * (idx_itemsize + 2 * C * itemsize) + T * C * itemsize, B * T * C)


def backward_cost(
    B: int, T: int, C: int, vocab_size: int, block_size: int, itemsize: int, idx_itemsize: int = 8
) -> Cost:
    """Reads dy and idx, writes the gradients of both weights."""
    return Cost(B * T * (idx_itemsize + C * itemsize) + (vocab_size + block_size) * C * itemsize, 2 * B * T * C)
