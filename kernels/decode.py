"""Attention of one query per head to a cache of keys and values: the decode step of generation (Vaswani et al. 2017,
https://arxiv.org/abs/1706.03762), with the keys split over programs (Flash-Decoding, Dao et al. 2023,
https://pytorch.org/blog/flash-decoding).

    of each tile of keys:   s = k·q/√D,   m = max s,   p = exp(s − m),   l = Σ p,   acc = Σ p·v
    of all tiles:           M = max m,    o = Σ exp(m − M)·acc / Σ exp(m − M)·l

q, o: (B, H, D); k_cache, v_cache: (B, H, T, D), fp32, fp16 or bf16, D from 1 to 128, read through strides. lengths:
(B,) integers, how many of the T keys each sequence has. s, p and all sums are fp32; m, l and acc of the tiles go
through memory in fp32. Nothing is saved: there is no backward pass.

A program of the first kernel takes the BLOCK_N keys of one tile of one head; one of the second adds the tiles of one
head in their order, BLOCK_M at a time. Tiles start at multiples of BLOCK_N and the order is fixed, so the bits of a
sequence depend neither on T, nor on the other sequences, nor on the run. Tiles beyond a sequence's length cost nothing.

A call reads 2·D·itemsize bytes per key and head, which is nearly all of it: tiles add 4/(BLOCK_N·itemsize) of that, 3%.
FLOPs: 4·D per key and head, too few for matrix instructions to matter with one query.
"""

import torch
import triton
import triton.language as tl

from kernels import launch
from kernels.cost import Cost
from kernels.dispatch import MAX_HEAD_DIM, autocast_dtype, check, register

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _length(lengths_ptr, b, stride_lb, T):
    """Number of keys of sequence b. A number that the cache cannot have is 0, so that nothing outside it is read."""
    length = tl.load(lengths_ptr + b * stride_lb)
    return tl.where((length >= 1) & (length <= T), length, 0).to(tl.int32)


@triton.jit
def _decode_attention_tile_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr,  # (B, H, D), (B, H, T, D), (B, H, T, D), (B,)
    acc_ptr, m_ptr, l_ptr,  # (B·H, n_tiles, D), (B·H, n_tiles), (B·H, n_tiles)
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_lb,
    H, T, n_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
):  # fmt: skip
    qk_scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2_E
    tile = tl.program_id(0) % n_tiles
    pid_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    length = _length(lengths_ptr, b, stride_lb, T)
    if tile * BLOCK_N < length:
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        rows, cols = offs_n.to(tl.int64)[:, None], offs_d.to(tl.int64)[None, :]
        mask = (offs_n < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
        k_ptrs = k_ptr + b * stride_kb + h * stride_kh + rows * stride_kn + cols * stride_kd
        v_ptrs = v_ptr + b * stride_vb + h * stride_vh + rows * stride_vn + cols * stride_vd
        q_ptrs = q_ptr + b * stride_qb + h * stride_qh + offs_d.to(tl.int64) * stride_qd
        k = tl.load(k_ptrs, mask=mask, other=0.0)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
        q = tl.load(q_ptrs, mask=offs_d < HEAD_DIM, other=0.0)
        s = tl.sum(k.to(COMPUTE_DTYPE) * q.to(COMPUTE_DTYPE)[None, :], 1) * qk_scale
        s = tl.where(offs_n < length, s, float("-inf"))  # the tile has at least one key, so m is not −inf
        m = tl.max(s, 0)
        p = tl.exp2(s - m)
        acc = tl.sum(p[:, None] * v.to(COMPUTE_DTYPE), 0)
        at = pid_bh * n_tiles + tile
        tl.store(m_ptr + at, m)
        tl.store(l_ptr + at, tl.sum(p, 0))
        tl.store(acc_ptr + at * HEAD_DIM + offs_d, acc, mask=offs_d < HEAD_DIM)


@triton.jit
def _decode_attention_sum_kernel(
    acc_ptr, m_ptr, l_ptr, lengths_ptr, o_ptr,  # as above; o (B, H, D), contiguous
    stride_lb,
    H, T, n_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):  # fmt: skip
    pid_bh = tl.program_id(0).to(tl.int64)
    n_used = tl.cdiv(_length(lengths_ptr, pid_bh // H, stride_lb, T), BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    o = tl.zeros([BLOCK_D], COMPUTE_DTYPE)
    l_i = tl.full([], 0.0, COMPUTE_DTYPE)
    m_i = tl.full([], float("-inf"), COMPUTE_DTYPE)
    for start in tl.range(0, n_used, BLOCK_M):
        tiles = start + tl.arange(0, BLOCK_M)
        used = tiles < n_used
        at = pid_bh * n_tiles + tiles
        m = tl.load(m_ptr + at, mask=used, other=float("-inf"))
        l = tl.load(l_ptr + at, mask=used, other=0.0)  # noqa: E741 (the paper's name)
        acc_ptrs = acc_ptr + at[:, None] * HEAD_DIM + offs_d[None, :]
        acc = tl.load(acc_ptrs, mask=used[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        m_new = tl.maximum(m_i, tl.max(m, 0))
        alpha = tl.exp2(m_i - m_new)
        weight = tl.exp2(m - m_new)
        l_i = l_i * alpha + tl.sum(weight * l, 0)
        o = o * alpha + tl.sum(weight[:, None] * acc, 0)
        m_i = m_new
    o_ptrs = o_ptr + pid_bh * HEAD_DIM + offs_d
    tl.store(o_ptrs, (o / l_i).to(o_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


def _forward(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    B, H, D = q.shape
    T = k_cache.shape[2]
    o = _empty(q)
    if o.numel() == 0:
        return o
    block_n = _config(q).block_n
    n_tiles = launch.cdiv(T, block_n)
    dtype = launch.wide_dtype(q.dtype)
    acc = q.new_empty((B * H, n_tiles, D), dtype=dtype)
    m, l = (q.new_empty((B * H, n_tiles), dtype=dtype) for _ in range(2))  # noqa: E741 (the paper's names)
    strides = (*q.stride(), *k_cache.stride(), *v_cache.stride(), *lengths.stride())
    launch.run(
        _decode_attention_tile_kernel,
        (q, k_cache, v_cache, lengths, acc, m, l),
        (*strides, H, T, n_tiles),
        lambda: ((n_tiles * B * H,), _constants(q)),
        q.shape,
    )
    launch.run(
        _decode_attention_sum_kernel,
        (acc, m, l, lengths, o),
        (*lengths.stride(), H, T, n_tiles),
        lambda: ((B * H,), _constants(q) | {"BLOCK_M": _config(q).block_m}),
        q.shape,
    )
    return o


def _config(q: torch.Tensor) -> launch.LaunchConfig:
    return launch.lookup("decode_attention", q.device, q.element_size(), q.shape[-1])


def _constants(q: torch.Tensor) -> dict:
    config = _config(q)
    return {
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": launch.next_power_of_2(q.shape[-1]),
        "BLOCK_N": config.block_n,
        "COMPUTE_DTYPE": launch.compute_dtype(q.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _empty(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_decode_attention = register("decode_attention", _forward, _empty)


def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Attention of one query per head to the first keys of a cache: softmax(k·q/√D)·v (Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762), by Flash-Decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding).

    Args:
        q: (B, H, D), any strides, D from 1 to 128; fp32, fp16 or bf16 (or fp64). Autocast casts it and the caches, as
            for torch's scaled_dot_product_attention.
        k_cache, v_cache: (B, H, T, D), any strides, T at least 1, of q's dtype. What lies beyond a sequence's length is
            not read.
        lengths: (B,) integers, number of keys of each sequence, from 1 to T. Others give NaN: to raise would cost a
            synchronisation per call.

    Returns:
        (B, H, D), contiguous, in q's dtype. Softmax and all sums are fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes do not fit, D is above 128, or a dtype or device differs.
        RuntimeError: a gradient is asked for; there is none.
    """
    check("decode_attention", {"q": q, "k_cache": k_cache, "v_cache": v_cache}, {"lengths": lengths})
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise RuntimeError("decode_attention has no gradient; call it under torch.no_grad(), or use eager")
    q, k_cache, v_cache = (x.to(autocast_dtype(x.device, x.dtype)) for x in (q, k_cache, v_cache))
    B, H, D = q.shape if q.dim() == 3 else (0, 0, 0)
    shapes_fit = k_cache.dim() == 4 and k_cache.shape[2] > 0 and (*k_cache.shape[:2], k_cache.shape[3]) == (B, H, D)
    if not shapes_fit or k_cache.shape != v_cache.shape or lengths.shape != (B,):
        given = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, v_cache, lengths))
        raise ValueError(
            f"decode_attention takes q (B, H, D), k_cache and v_cache (B, H, T, D) and lengths (B,); got {given}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache have one dtype; got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"decode_attention takes a head_dim of 1 to {MAX_HEAD_DIM}, and was given {D}")
    return _decode_attention(q, k_cache, v_cache, lengths)


def forward_cost(n_keys: int, B: int, H: int, D: int, itemsize: int, lengths_itemsize: int = 8) -> Cost:
    """Reads q, lengths, and the keys and values of n_keys, the sum of all lengths; writes o."""
    moved = 2 * n_keys * H * D * itemsize + 2 * B * H * D * itemsize + B * lengths_itemsize
    return Cost(moved, 4 * n_keys * H * D)
