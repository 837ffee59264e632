"""Causal self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), forward and backward, in tiles that
never leave the chip, as in FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).

    s = q·kᵀ/√D over the keys up to the query's position,   p = softmax(s),   o = p·v,   lse = log₂ Σ exp(s)
    dv = pᵀ·do,   ds = p∘(do·vᵀ − delta),   dq = ds·k/√D,   dk = dsᵀ·q/√D,   delta = rowsum(o∘do)

q, k, v, o: (B, H, T, D), fp32, fp16 or bf16, D from 1 to 128. All are read and written through strides: the packed
form (B, T, 3C) is three such views of one tensor, its gradient three of another, and nothing is transposed or copied.
Saved for backward: the inputs, o, and lse, (B, H, T) in base 2, in fp32, or in fp64 if the inputs are fp32: backward
recomputes p as exp2(s·log₂e − lse), so the rounding error of lse becomes one of p, which eager, saving p, does not
have. s, p, dp, ds and all sums are fp32. p and ds are rounded to the inputs' dtype for the next product, and stay in
registers.

Forward: a program takes BLOCK_M queries over all their keys, with an online softmax in base 2. Backward: one kernel
takes BLOCK_M queries over their keys for dq, and also computes delta, since it has do; a second one takes BLOCK_N keys
over their queries for dk and dv. No program adds to the result of another one, so results are bitwise identical from
run to run. The price is that both kernels compute s and dp: 7 products instead of 5. Tiles on the diagonal have a mask;
tiles in which all keys come before all queries have none.

Forward moves 4·B·H·T·D elements and lse, backward 8·B·H·T·D and lse (delta, written once and read once, is not
compulsory). FLOPs as usually counted, the causal half of 2 and of 5 products of T×T by D: 2·B·H·T²·D forward and 2.5
times as many backward, where 3.5 times as many are executed.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels import column_sums, launch
from kernels.cost import Cost
from kernels.dispatch import MAX_HEAD_DIM, PLAIN, autocast_dtype, check, register
from kernels.tiles import LOG2_E, dot, load, load_row, operand, pointers, store

GROUP_BYTES = 32 * 2**20
"""most bytes of the keys and values of a group of heads: they should stay in L2, which has 40 MB on an A100"""


@triton.jit
def _program(H):
    """(place of this program's block among those of its head, the longest first; head; its b and h)."""
    head = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    return tl.program_id(1), head, head // H, head % H


@triton.jit
def _probabilities(s, lse):
    """exp2(s − lse) of scaled scores. If lse has more digits than s, they are subtracted last."""
    rounded = lse.to(s.dtype)
    s = s - rounded
    if lse.dtype != s.dtype:
        s = s - (lse - rounded).to(s.dtype)
    return tl.exp2(s)


@triton.jit
def _store_sums(sums_ptr, tile, b, h, H, part, n_parts, offs_d, HEAD_DIM: tl.constexpr):
    """The column sums of a gradient's tile, whose rows beyond T are zero, as a row of (B·blocks, n_parts, H, D)."""
    row = b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    offs = ((row * n_parts + part) * H + h) * HEAD_DIM + offs_d
    # In pairs of columns: a plain sum over rows takes so many registers that ptxas would serialise wgmma.
    pairs = tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)), 0)
    tl.store(sums_ptr + offs, tl.reshape(pairs, (tile.shape[1],)), mask=offs_d < HEAD_DIM)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    H, T,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_T: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    qk_scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2_E
    place, bh, b, h = _program(H)
    start_m = (tl.num_programs(1) - 1 - place) * BLOCK_M  # the last queries have the most keys
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = pointers(q_ptr, b, h, offs_m, offs_d, stride_qb, stride_qh, stride_qm, stride_qd)
    k_ptrs = pointers(k_ptr, b, h, offs_n, offs_d, stride_kb, stride_kh, stride_kn, stride_kd)
    v_ptrs = pointers(v_ptr, b, h, offs_n, offs_d, stride_vb, stride_vh, stride_vn, stride_vd)
    q = load(q_ptrs, offs_m, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_D], COMPUTE_DTYPE)
    l_i = tl.zeros([BLOCK_M], COMPUTE_DTYPE)
    m_i = tl.full([BLOCK_M], float("-inf"), COMPUTE_DTYPE)
    diagonal = start_m // BLOCK_N * BLOCK_N
    for IS_FULL in tl.static_range(2):
        start = 0 if IS_FULL else diagonal
        stop = diagonal if IS_FULL else tl.minimum(start_m + BLOCK_M, T)
        for start_n in tl.range(start, stop, BLOCK_N):
            step = tl.cast(start_n, tl.int64)
            k = load(k_ptrs + step * stride_kn, start_n + offs_n, T, offs_d, EVEN_T or IS_FULL, HEAD_DIM, BLOCK_D)
            s = dot(q, tl.trans(k), None, INPUT_PRECISION, COMPUTE_DTYPE)
            if not IS_FULL:
                s = tl.where((offs_m - start_n)[:, None] >= offs_n[None, :], s, float("-inf"))
            # The first tile has a key for every query, so m_new is never −inf, and no difference below is −inf − −inf.
            m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
            p = tl.exp2(s * qk_scale - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            v = load(v_ptrs + step * stride_vn, start_n + offs_n, T, offs_d, EVEN_T or IS_FULL, HEAD_DIM, BLOCK_D)
            acc = dot(p.to(v.dtype), v, acc, INPUT_PRECISION, COMPUTE_DTYPE)
            m_i = m_new

    o_ptrs = pointers(o_ptr, b, h, offs_m, offs_d, stride_ob, stride_oh, stride_om, stride_od)
    store(o_ptrs, acc / l_i[:, None], offs_m, T, offs_d, HEAD_DIM)
    lse = m_i.to(lse_ptr.dtype.element_ty) + tl.log2(l_i)
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, lse, mask=offs_m < T)


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, sums_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    H, T,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_T: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    qk_scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2_E
    place, bh, b, h = _program(H)
    start_m = (tl.num_programs(1) - 1 - place) * BLOCK_M  # the last queries have the most keys
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows = bh.to(tl.int64) * T + offs_m

    o_ptrs = pointers(o_ptr, b, h, offs_m, offs_d, stride_ob, stride_oh, stride_om, stride_od)
    do_ptrs = pointers(do_ptr, b, h, offs_m, offs_d, stride_dob, stride_doh, stride_dom, stride_dod)
    o = load(o_ptrs, offs_m, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)
    do = load(do_ptrs, offs_m, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)
    delta = tl.sum(o.to(COMPUTE_DTYPE) * operand(do, INPUT_PRECISION).to(COMPUTE_DTYPE), 1)
    tl.store(delta_ptr + rows, delta, mask=offs_m < T)

    q_ptrs = pointers(q_ptr, b, h, offs_m, offs_d, stride_qb, stride_qh, stride_qm, stride_qd)
    k_ptrs = pointers(k_ptr, b, h, offs_n, offs_d, stride_kb, stride_kh, stride_kn, stride_kd)
    v_ptrs = pointers(v_ptr, b, h, offs_n, offs_d, stride_vb, stride_vh, stride_vn, stride_vd)
    q = load(q_ptrs, offs_m, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)
    lse = load_row(lse_ptr + rows, offs_m, T, EVEN_T)
    last_key = tl.where(offs_m > 0, offs_m, -1)  # with its one key, the first query has ds 0 but for rounding
    dq = tl.zeros([BLOCK_M, BLOCK_D], COMPUTE_DTYPE)
    diagonal = start_m // BLOCK_N * BLOCK_N
    for IS_FULL in tl.static_range(2):
        start = 0 if IS_FULL else diagonal
        stop = diagonal if IS_FULL else tl.minimum(start_m + BLOCK_M, T)
        for start_n in tl.range(start, stop, BLOCK_N):
            step = tl.cast(start_n, tl.int64)
            k = load(k_ptrs + step * stride_kn, start_n + offs_n, T, offs_d, EVEN_T or IS_FULL, HEAD_DIM, BLOCK_D)
            v = load(v_ptrs + step * stride_vn, start_n + offs_n, T, offs_d, EVEN_T or IS_FULL, HEAD_DIM, BLOCK_D)
            s = dot(q, tl.trans(k), None, INPUT_PRECISION, COMPUTE_DTYPE)
            p = _probabilities(s * qk_scale, lse[:, None])
            if not IS_FULL:
                p = tl.where(last_key[:, None] >= start_n + offs_n[None, :], p, 0.0)
            dp = dot(do, tl.trans(v), None, INPUT_PRECISION, COMPUTE_DTYPE)
            ds = p * (dp - delta[:, None])
            dq = dot(ds.to(k.dtype), k, dq, INPUT_PRECISION, COMPUTE_DTYPE)

    dq_ptrs = pointers(dq_ptr, b, h, offs_m, offs_d, stride_dqb, stride_dqh, stride_dqm, stride_dqd)
    dq *= HEAD_DIM**-0.5
    store(dq_ptrs, dq, offs_m, T, offs_d, HEAD_DIM)
    if sums_ptr is not None:
        _store_sums(sums_ptr, dq, b, h, H, 0, 1, offs_d, HEAD_DIM)


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, sums_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    H, T,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_T: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    qk_scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2_E
    place, bh, b, h = _program(H)
    start_n = place * BLOCK_N  # the first keys have the most queries
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = pointers(q_ptr, b, h, offs_m, offs_d, stride_qb, stride_qh, stride_qm, stride_qd)
    k_ptrs = pointers(k_ptr, b, h, offs_n, offs_d, stride_kb, stride_kh, stride_kn, stride_kd)
    v_ptrs = pointers(v_ptr, b, h, offs_n, offs_d, stride_vb, stride_vh, stride_vn, stride_vd)
    do_ptrs = pointers(do_ptr, b, h, offs_m, offs_d, stride_dob, stride_doh, stride_dom, stride_dod)
    first_row = bh.to(tl.int64) * T
    k = load(k_ptrs, offs_n, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)
    v = load(v_ptrs, offs_n, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)

    dk = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE_DTYPE)
    dv = tl.zeros([BLOCK_N, BLOCK_D], COMPUTE_DTYPE)
    diagonal = start_n // BLOCK_M * BLOCK_M
    full = tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M
    for IS_FULL in tl.static_range(2):
        start = full if IS_FULL else diagonal
        stop = T if IS_FULL else tl.minimum(full, T)
        for start_m in tl.range(start, stop, BLOCK_M):
            step = tl.cast(start_m, tl.int64)
            rows = start_m + offs_m
            # Everything is transposed, so that p and ds are left operands, which may stay in registers. Beyond T, q and
            # do are zero and p is finite, so nothing is added. lse and delta are loaded late to save registers.
            q = load(q_ptrs + step * stride_qm, rows, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)
            s_t = dot(k, tl.trans(q), None, INPUT_PRECISION, COMPUTE_DTYPE)
            lse = load_row(lse_ptr + first_row + rows, rows, T, EVEN_T)
            p_t = _probabilities(s_t * qk_scale, lse[None, :])
            if not IS_FULL:
                p_t = tl.where(rows[None, :] >= offs_n[:, None], p_t, 0.0)
            do = load(do_ptrs + step * stride_dom, rows, T, offs_d, EVEN_T, HEAD_DIM, BLOCK_D)
            dv = dot(p_t.to(do.dtype), do, dv, INPUT_PRECISION, COMPUTE_DTYPE)
            dp_t = dot(v, tl.trans(do), None, INPUT_PRECISION, COMPUTE_DTYPE)
            delta = load_row(delta_ptr + first_row + rows, rows, T, EVEN_T)
            ds_t = p_t * (dp_t - delta[None, :])
            if not IS_FULL:
                ds_t = tl.where(rows[None, :] > 0, ds_t, 0.0)  # as in the kernel above
            dk = dot(ds_t.to(q.dtype), q, dk, INPUT_PRECISION, COMPUTE_DTYPE)

    dk_ptrs = pointers(dk_ptr, b, h, offs_n, offs_d, stride_dkb, stride_dkh, stride_dkn, stride_dkd)
    dv_ptrs = pointers(dv_ptr, b, h, offs_n, offs_d, stride_dvb, stride_dvh, stride_dvn, stride_dvd)
    dk *= HEAD_DIM**-0.5
    store(dk_ptrs, dk, offs_n, T, offs_d, HEAD_DIM)
    store(dv_ptrs, dv, offs_n, T, offs_d, HEAD_DIM)
    if sums_ptr is not None:
        _store_sums(sums_ptr, dk, b, h, H, 0, 2, offs_d, HEAD_DIM)
        _store_sums(sums_ptr, dv, b, h, H, 1, 2, offs_d, HEAD_DIM)


Heads = tuple[torch.Tensor, tuple[int, ...]]
"""(B, H, T, D) for a kernel: a tensor that starts with the first element, and four strides. It costs no view."""


def _launch(
    kernel: triton.JITFunction,
    op: str,
    owns: str,
    shape: tuple[int, ...],
    heads: Sequence[Heads],
    rows: Sequence[torch.Tensor | None],
) -> None:
    """Run a kernel over all heads.

    Args:
        kernel: one of the three above.
        op: its name in launch.CONFIGS.
        owns: "block_m" or "block_n": the block for which a program computes the whole result.
        shape: (B, H, T, D).
        heads: in the kernel's order, q first.
        rows: lse and, in backward, delta: (B, H, T), contiguous; then the column sums of the gradients, or None.
    """
    if 0 in shape:
        return
    tensors = [x for x, _ in heads]
    if type(tensors[0]) not in PLAIN:  # who counts launches on fake tensors sees the shape (B, H, T, D)
        tensors = [x.as_strided(shape, strides) for x, strides in heads]
    numbers = (*(stride for _, strides in heads for stride in strides), shape[1], shape[2])
    precision = launch.fp32_dot_precision() if tensors[0].dtype == torch.float32 else "ieee"
    launch.run(
        kernel,
        (*tensors, *rows),
        numbers,
        lambda: _configure(op, owns, shape, tensors[0], precision),
        (shape, precision),
    )


def _configure(
    op: str, owns: str, shape: tuple[int, ...], q: torch.Tensor, precision: str
) -> tuple[tuple[int, ...], dict]:
    B, H, T, D = shape
    config = launch.lookup(op, q.device, q.element_size(), D)
    constants = {
        "HEAD_DIM": D,
        "BLOCK_D": max(16, launch.next_power_of_2(D)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "EVEN_T": T % config.block_m == 0 and T % config.block_n == 0,
        "COMPUTE_DTYPE": launch.compute_dtype(q.dtype),
        "INPUT_PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }
    group = _group(B * H, min(launch.n_programs(q.device), GROUP_BYTES // (2 * T * D * q.element_size())))
    return (group, _n_blocks(op, owns, shape, q), B * H // group), constants


@functools.cache
def _group(n_heads: int, most: int) -> int:
    """The largest divisor of n_heads that is at most `most`. A grid has at most 65,535 groups."""
    group = next(size for size in range(min(n_heads, max(most, 1)), 0, -1) if n_heads % size == 0)
    return group if n_heads // group < 65536 else n_heads


def _forward(shape: tuple[int, ...], q: Heads, k: Heads, v: Heads, o: Heads) -> torch.Tensor:
    """Write o and return lse."""
    lse = _empty_lse(shape, q[0])
    _launch(_attention_fwd_kernel, "attention", "block_m", shape, (q, k, v, o), (lse,))
    return lse


def _backward(
    shape: tuple[int, ...],
    do: Heads,
    o: Heads,
    q: Heads,
    k: Heads,
    v: Heads,
    lse: torch.Tensor,
    dq: Heads,
    dk: Heads,
    dv: Heads,
    dbias: torch.Tensor | None = None,
) -> None:
    """Write dq, dk and dv, and if given dbias, (3·H·D,): their sums over B and T."""
    wide = launch.wide_dtype(q[0].dtype)
    delta = torch.empty_like(lse, dtype=wide)
    sums_q = sums_kv = None
    if dbias is not None:
        sums_q, sums_kv = (
            q[0].new_empty((_n_blocks(op, owns, shape, q[0]) * shape[0], n * shape[1] * shape[3]), dtype=wide)
            for op, owns, n in (("attention_dq", "block_m", 1), ("attention_dkdv", "block_n", 2))
        )
    _launch(_attention_bwd_dq_kernel, "attention_dq", "block_m", shape, (q, k, v, o, do, dq), (lse, delta, sums_q))
    _launch(
        _attention_bwd_dkdv_kernel, "attention_dkdv", "block_n", shape, (q, k, v, do, dk, dv), (lse, delta, sums_kv)
    )
    if dbias is not None and sums_q is not None and sums_kv is not None:
        width = sums_q.shape[1]
        column_sums.add_up(sums_q, dbias[:width])
        column_sums.add_up(sums_kv, dbias[width:])


def _n_blocks(op: str, owns: str, shape: tuple[int, ...], q: torch.Tensor) -> int:
    config = launch.lookup(op, q.device, q.element_size(), shape[-1])
    return launch.cdiv(shape[2], getattr(config, owns))


def _lse_dtype(itemsize: int) -> torch.dtype:
    return torch.float32 if itemsize == 2 else torch.float64


def _empty_lse(shape: tuple[int, ...], q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(shape[:-1], dtype=_lse_dtype(q.element_size()))


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _packed_shape(qkv: torch.Tensor, n_head: int) -> tuple[int, int, int, int]:
    B, T, width = qkv.shape
    return B, n_head, T, width // 3 // n_head


def _strides(x: torch.Tensor, head_dim: int) -> tuple[int, int, int, int]:
    """Strides of (B, T, C) as (B, H, T, D)."""
    stride_b, stride_t, stride_c = x.stride()
    return stride_b, head_dim * stride_c, stride_t, stride_c


def _split_heads(qkv: torch.Tensor, head_dim: int) -> tuple[Heads, Heads, Heads]:
    q, k, v = qkv.chunk(3, dim=-1)
    strides = _strides(qkv, head_dim)
    return (q, strides), (k, strides), (v, strides)


def _heads(x: torch.Tensor) -> Heads:
    return x, x.stride()


def _dense_rows(do: torch.Tensor) -> torch.Tensor:
    return do if do.stride(-1) == 1 else do.contiguous()


def packed_outputs(qkv: torch.Tensor, n_head: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty((B, T, width // 3)), _empty_lse(_packed_shape(qkv, n_head), qkv)


def packed_forward(qkv: torch.Tensor, n_head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, 3C) -> (o (B, T, C), lse)"""
    B, H, T, D = shape = _packed_shape(qkv, n_head)
    o = qkv.new_empty((B, T, H * D))
    return o, _forward(shape, *_split_heads(qkv, D), (o, _strides(o, D)))


def packed_backward(
    do: torch.Tensor,
    qkv: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    n_head: int,
    dbias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of qkv, contiguous; do may have any strides. Its column sums go to dbias, (3C,)."""
    shape = _packed_shape(qkv, n_head)
    D = shape[-1]
    do, dqkv = _dense_rows(do), _empty_like(qkv)
    do_and_o = (do, _strides(do, D)), (o, _strides(o, D))
    _backward(shape, *do_and_o, *_split_heads(qkv, D), lse, *_split_heads(dqkv, D), dbias)
    return dqkv


def _separate_outputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(q), _empty_lse(q.shape, q)


def _separate_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    o = _empty_like(q)
    return o, _forward(q.shape, _heads(q), _heads(k), _heads(v), _heads(o))


def _separate_backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = _empty_like(q), _empty_like(k), _empty_like(v)
    dq, dk, dv = gradients
    do_and_o = _heads(_dense_rows(do)), _heads(o)
    _backward(q.shape, *do_and_o, _heads(q), _heads(k), _heads(v), lse, _heads(dq), _heads(dk), _heads(dv))
    return gradients


def _save(ctx, inputs, output):
    qkv, ctx.n_head = inputs
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx, do, *_):
    return _attention_backward(do, *ctx.saved_tensors, ctx.n_head), None


def _save_qkv(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _differentiate_qkv(ctx, do, *_):
    return _attention_qkv_backward(do, *ctx.saved_tensors)


_attention_backward = register("attention_backward", packed_backward, lambda do, qkv, *others: _empty_like(qkv))
_attention = register("attention", packed_forward, packed_outputs, _save, _differentiate, visible=1)
_attention_qkv_backward = register(
    "attention_qkv_backward", _separate_backward, lambda do, q, k, v, *others: tuple(map(_empty_like, (q, k, v)))
)
_attention_qkv = register(
    "attention_qkv", _separate_forward, _separate_outputs, _save_qkv, _differentiate_qkv, visible=1
)


def attention(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
    """Causal self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) of packed projections:
    softmax(q·kᵀ/√D over positions up to the query's)·v, by FlashAttention-2 (Dao 2023,
    https://arxiv.org/abs/2307.08691).

    Args:
        qkv: (B, T, 3C), query, key and value side by side in that order; each is n_head heads of D = C/n_head. Any
            strides, any T, D from 1 to 128; fp32, fp16 or bf16 (fp64 for gradcheck). Autocast casts it, as for torch's
            scaled_dot_product_attention.
        n_head: number of heads, a divisor of C.

    Returns:
        (B, T, C), heads side by side; contiguous, in the input's dtype. Softmax and all sums are fp32 (fp64 for fp64).
        Products of fp32 inputs are IEEE, or TF32 (operands rounded to nearest) if torch's own CUDA matmuls use it.

    Raises:
        ValueError: D is above 128, n_head does not divide C, or qkv has another dtype.
    """
    check("attention", {"qkv": qkv})
    qkv = _autocast(qkv)
    if qkv.dim() != 3 or qkv.shape[-1] % 3 or n_head < 1 or qkv.shape[-1] // 3 % n_head:
        raise ValueError(f"qkv is (B, T, 3C) and n_head divides C; got {tuple(qkv.shape)} and {n_head} heads")
    _check(qkv.shape[-1] // 3 // n_head)
    return _attention(qkv, n_head)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`attention` of separate tensors.

    Args:
        q, k, v: (B, H, T, D) each, of one shape and dtype; otherwise like `qkv` of `attention`.

    Returns:
        (B, H, T, D), contiguous, in the inputs' dtype.

    Raises:
        ValueError: D is above 128, q, k and v differ in shape, dtype or device, or have another dtype.
    """
    check("attention", {"q": q, "k": k, "v": v})
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    if q.dim() != 4 or not all((x.shape, x.dtype) == (q.shape, q.dtype) for x in (k, v)):
        what = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q, k and v are (B, H, T, D), alike in shape and dtype; got {what}")
    _check(q.shape[-1])
    return _attention_qkv(q, k, v)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    return x.to(autocast_dtype(x.device, x.dtype))


def _check(head_dim: int) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention takes a head_dim of 1 to {MAX_HEAD_DIM}, and was given {head_dim}")


def forward_cost(B: int, H: int, T: int, D: int, itemsize: int) -> Cost:
    """Reads q, k and v, writes o and lse; half of two products of T×T by D."""
    return Cost(B * H * T * (4 * D * itemsize + _lse_dtype(itemsize).itemsize), 2 * B * H * T * T * D)


def backward_cost(B: int, H: int, T: int, D: int, itemsize: int) -> Cost:
    """Reads q, k, v, o, do and lse, writes dq, dk and dv; half of five products, as usually counted. Seven are
    executed, since dq has a pass of its own."""
    return Cost(B * H * T * (8 * D * itemsize + _lse_dtype(itemsize).itemsize), 5 * B * H * T * T * D)
