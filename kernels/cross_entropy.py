"""Cross-entropy of logits, and of the tied head without all logits in memory, forward and backward.

    m = maxᵥ xᵥ,  rest = Σ exp(xᵥ − m) over v ≠ target,  l = rest + exp(x[target] − m)     for a row x of logits
    p = exp(x − m)/l,  p[target] − 1 = −rest/l
    loss = mean of log l + m − x[target] over the n_counted rows whose target is not ignored
    dx = (p − onehot(target))·dloss/n_counted, zero if the target is ignored

One online pass computes m and rest (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867). The sum leaves out
the target, so that nothing cancels in p − 1, nor in the logarithm of an l near 1. All is fp32 (fp64 for fp64), also the
loss. Saved for backward: the logits, and m, 1/l and −rest/l per row. Not lse = m + log l: at |m| = 100, its rounding
error would be 4e-6 of every probability. n rows of V logits are read once forward, and read once and written once
backward: 3·n·V·itemsize bytes, with about 5 FLOPs per logit each way.

The tied head takes the rows in chunks, and computes the gradients in the same pass (Hsu et al. 2024,
https://arxiv.org/abs/2410.10989). For each chunk, in one buffer:

    logits = hidden·weightᵀ     torch's matmul
    logits ← (p − onehot)·2¹⁵   one kernel; a program reads its row twice, the second time from L2, and writes it once
    dhidden = logits·weight,  dweight += logitsᵀ·hidden

The missing factor, dloss/(n_counted·2¹⁵), is known in backward; until then both gradients are saved in fp32, and
nothing else is. 6·n·V·C FLOPs, or 2·n·V·C without gradients. A chunk of logits is written twice and read four times,
one of these from L2, and each chunk reads and writes the 4·V·C bytes of dweight.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import launch
from kernels.cost import Cost
from kernels.dispatch import PLAIN, autocast_dtype, check, register, transformed

IGNORE_INDEX = -1

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""the lowest number in fp32; unlike −∞ it may be subtracted from −∞"""
GRADIENT_SCALE = 2.0**15
"""The largest power of two by which |p − onehot| ≤ 1 stays finite in fp16, where p then survives from 2⁻³⁹ on. That is
more than in eager, where p·S/n_counted survives from 2⁻²⁴ on, with S = 2¹⁶ at the start of a GradScaler. A power of two
adds no rounding error."""

CHUNK_BUDGET = 512 * 2**20
"""Most bytes of a chunk of logits. 5,248 rows of GPT-2's vocabulary in 16 bits fit; at C = 768 dhidden then has 123
tiles of 128 × 256, nearly one for each of an H100's 132 multiprocessors."""
PEAK_FRACTION = 8
"""Beside the gradients, the head takes at most 1/PEAK_FRACTION of the memory of all logits."""
CHUNK_BLOCK = 128
"""rows of a matmul's tile; chunks are multiples of it"""
ALIGNMENT = 64
"""Rows of the chunk's buffer start at multiples of it, in elements: kernel and matmuls need 16 bytes, and rows of 50257
would not be aligned. The padding is never read or written."""


@triton.jit
def _exp(x):
    """Natural exponential. Unlike tl.exp it flushes numbers below 2⁻¹²⁶ to zero, which saves three instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _online_softmax(x, m_i, l_i):
    """Add a block, (BLOCK_N/8, 8), to a maximum and a sum per row of it. A row belongs to one thread, so threads do not
    wait for each other."""
    m_new = tl.maximum(m_i, tl.max(x, 1))
    return m_new, l_i * _exp(m_i - m_new) + tl.sum(_exp(x - m_new[:, None]), 1)


@triton.jit
def _log1p(x):
    """log(1 + x), accurate for small x too, without libdevice (Kahan; Goldberg 1991, theorem 4)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _load_target(targets_ptr, row, n_cols, ignore_index):
    """(target, whether it counts). Ignored targets and those out of range do not count, and become 0."""
    target = tl.load(targets_ptr + row).to(tl.int64)
    is_counted = (target != ignore_index) & (target >= 0) & (target < n_cols)
    return tl.where(is_counted, target, 0).to(tl.int32), is_counted


@triton.jit
def _offsets(BLOCK_N: tl.constexpr):
    """Of a block, (BLOCK_N/8, 8): a thread has rows, and loads 8 neighbours at once."""
    return tl.arange(0, BLOCK_N // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _row_statistics(row_ptr, n_cols, target, is_counted, COMPUTE_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr):
    """m, 1/l, p[target] − 1 and the loss. Only the last block has a mask: for odd n_cols it would forbid 128-bit loads.
    And only the target's block leaves something out."""
    # Loaded first: that hides the latency, and the reductions below wait for it, so that no other warp can overwrite it
    # with the gradient before.
    x_target = tl.load(row_ptr + target).to(COMPUTE_DTYPE)
    m_i = tl.full((BLOCK_N // 8,), LOWEST, COMPUTE_DTYPE)
    l_i = tl.full((BLOCK_N // 8,), 0.0, COMPUTE_DTYPE)
    offs = _offsets(BLOCK_N)
    n_whole = n_cols // BLOCK_N * BLOCK_N
    for start in range(0, n_whole, BLOCK_N):
        x = tl.load(row_ptr + start + offs).to(COMPUTE_DTYPE)
        if (target >= start) & (target < start + BLOCK_N):
            x = tl.where(offs == target - start, float("-inf"), x)
        m_i, l_i = _online_softmax(x, m_i, l_i)
    if n_whole < n_cols:
        x = tl.load(row_ptr + n_whole + offs, mask=offs < n_cols - n_whole, other=float("-inf")).to(COMPUTE_DTYPE)
        m_i, l_i = _online_softmax(tl.where(offs == target - n_whole, float("-inf"), x), m_i, l_i)

    m = tl.maximum(tl.max(m_i, 0), x_target)
    rest = tl.sum(l_i * _exp(m_i - m), 0)
    p_target = _exp(x_target - m)
    total = rest + p_target
    log_l = tl.where(x_target == m, _log1p(rest), tl.log(total))
    return m, 1.0 / total, -rest / total, tl.where(is_counted, log_l + (m - x_target), 0.0)


@triton.jit
def _row_gradient(
    row_ptr,
    d_row_ptr,
    n_cols,
    target,
    is_counted,
    m,
    inverse_l,
    d_target,
    scale,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write (p − onehot)·scale to d_row_ptr, which may be row_ptr; zeros if the target is not counted."""
    dtype = d_row_ptr.dtype.element_ty
    factor = tl.where(is_counted, inverse_l * scale, 0.0)
    m = tl.where(is_counted, m, 0.0)
    offs = _offsets(BLOCK_N)
    n_whole = n_cols // BLOCK_N * BLOCK_N
    for start in range(0, n_whole, BLOCK_N):
        x = tl.where(is_counted, tl.load(row_ptr + start + offs).to(COMPUTE_DTYPE), 0.0)
        tl.store(d_row_ptr + start + offs, (_exp(x - m) * factor).to(dtype))
    if n_whole < n_cols:
        mask = offs < n_cols - n_whole
        x = tl.load(row_ptr + n_whole + offs, mask=mask, other=0.0).to(COMPUTE_DTYPE)
        dx = _exp(tl.where(is_counted, x, 0.0) - m) * factor
        tl.store(d_row_ptr + n_whole + offs, dx.to(dtype), mask=mask)
    tl.debug_barrier()  # what another thread wrote there is overwritten
    tl.store(d_row_ptr + target, (d_target * scale).to(dtype), mask=is_counted)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    statistics_ptr,
    stride_row,
    n_cols,
    ignore_index,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    target, is_counted = _load_target(targets_ptr, row, n_cols, ignore_index)
    m, inverse_l, d_target, loss = _row_statistics(row_ptr, n_cols, target, is_counted, COMPUTE_DTYPE, BLOCK_N)
    tl.store(losses_ptr + row, loss)
    tl.store(statistics_ptr + 3 * row, m)
    tl.store(statistics_ptr + 3 * row + 1, inverse_l)
    tl.store(statistics_ptr + 3 * row + 2, d_target)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr,
    targets_ptr,
    dlogits_ptr,
    statistics_ptr,
    dloss_ptr,
    n_counted_ptr,
    stride_row,
    stride_d_row,
    n_cols,
    ignore_index,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target, is_counted = _load_target(targets_ptr, row, n_cols, ignore_index)
    _row_gradient(
        logits_ptr + row * stride_row,
        dlogits_ptr + row * stride_d_row,
        n_cols,
        target,
        is_counted,
        tl.load(statistics_ptr + 3 * row),
        tl.load(statistics_ptr + 3 * row + 1),
        tl.load(statistics_ptr + 3 * row + 2),
        tl.load(dloss_ptr) / tl.load(n_counted_ptr),
        COMPUTE_DTYPE,
        BLOCK_N,
    )


@triton.jit
def _linear_cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    stride_row,
    n_cols,
    ignore_index,
    scale,
    HAS_GRADIENT: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the loss of a row, then the gradient over its logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    target, is_counted = _load_target(targets_ptr, row, n_cols, ignore_index)
    m, inverse_l, d_target, loss = _row_statistics(row_ptr, n_cols, target, is_counted, COMPUTE_DTYPE, BLOCK_N)
    tl.store(losses_ptr + row, loss)
    if HAS_GRADIENT:
        _row_gradient(
            row_ptr, row_ptr, n_cols, target, is_counted, m, inverse_l, d_target, scale, COMPUTE_DTYPE, BLOCK_N
        )


@triton.jit
def _mean_kernel(
    losses_ptr, targets_ptr, loss_ptr, n_counted_ptr, is_valid_ptr, n_rows, n_cols, ignore_index, BLOCK_N: tl.constexpr
):
    """One program, so that the order of the sum is fixed. n_counted is at least 1, because backward divides by it."""
    offs = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), losses_ptr.dtype.element_ty)
    n_counted = tl.zeros((BLOCK_N,), tl.int32)
    n_invalid = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, n_rows, BLOCK_N):
        mask = start + offs < n_rows
        total += tl.load(losses_ptr + start + offs, mask=mask, other=0.0)
        # In int64, since the targets' dtype may not hold ignore_index: −1 would be class 255 in uint8.
        target = tl.load(targets_ptr + start + offs, mask=mask, other=0).to(tl.int64)
        is_counted = mask & (target != ignore_index)
        n_counted += is_counted.to(tl.int32)
        n_invalid += (is_counted & ((target < 0) | (target >= n_cols))).to(tl.int32)
    n = tl.sum(n_counted, 0)
    divisor = tl.maximum(n, 1).to(loss_ptr.dtype.element_ty)
    tl.store(loss_ptr, tl.where(n > 0, tl.sum(total, 0) / divisor, float("nan")))
    tl.store(n_counted_ptr, divisor)
    tl.store(is_valid_ptr, (tl.sum(n_invalid, 0) == 0).to(tl.int32))


def _launch(
    kernel: triton.JITFunction, tensors: tuple[torch.Tensor, ...], *numbers: int | float, **constexprs: bool
) -> None:
    """Run a kernel with one program per row of the first tensor, logits (n_rows, V) with contiguous rows."""
    logits = tensors[0]
    n_rows = len(logits)
    if n_rows > 0:
        numbers = (logits.stride(0), *numbers)
        also = (n_rows, *constexprs.values())
        launch.run(kernel, tensors, numbers, lambda: _configure(logits, constexprs), also)


def _configure(logits: torch.Tensor, constexprs: dict[str, bool]) -> tuple[tuple[int, ...], dict]:
    n_rows, n_cols = logits.shape
    config = launch.lookup("cross_entropy", logits.device, logits.element_size(), n_cols)
    constants = constexprs | {
        "COMPUTE_DTYPE": launch.compute_dtype(logits.dtype),
        # A vocabulary smaller than a block goes in one small block.
        "BLOCK_N": min(config.block_n, 8 * launch.next_power_of_2(n_cols)),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (n_rows,), constants


def _mean(
    losses: torch.Tensor, targets: torch.Tensor, n_cols: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, n_counted, at least 1). Checks that every target is in range."""
    loss, n_counted = (torch.empty((), dtype=losses.dtype, device=losses.device) for _ in range(2))
    is_valid = torch.empty((), dtype=torch.int32, device=losses.device)
    tensors = losses, targets, loss, n_counted, is_valid
    launched = launch.run(_mean_kernel, tensors, (len(losses), n_cols, ignore_index), lambda: _configure_mean(losses))
    if not launched and type(is_valid) in PLAIN:  # a dry run; on fake tensors the check is counted
        return loss, n_counted
    launch.require(is_valid, f"a target is out of bounds: it is neither in [0, {n_cols}) nor {ignore_index}")
    return loss, n_counted


def _configure_mean(losses: torch.Tensor) -> tuple[tuple[int, ...], dict]:
    config = launch.lookup("cross_entropy", losses.device, losses.element_size())
    constants = {
        "BLOCK_N": min(config.block_n, launch.next_power_of_2(len(losses))),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (1,), constants


def _forward(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, inplace_backward: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, statistics, n_counted). `inplace_backward` selects one of the two ops for backward."""
    n_rows, wide = len(logits), launch.wide_dtype(logits.dtype)
    losses, statistics = logits.new_empty(n_rows, dtype=wide), logits.new_empty((n_rows, 3), dtype=wide)
    _launch(_cross_entropy_fwd_kernel, (logits, targets, losses, statistics), logits.shape[1], ignore_index)
    loss, n_counted = _mean(losses, targets, logits.shape[1], ignore_index)
    return loss, statistics, n_counted


def _empty_like_rows(logits: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the shape of logits. Its rows are padded if theirs are, but to Vp, a multiple of 128, at most:
    theirs may be slices of wider ones."""
    n_rows, n_cols = logits.shape
    stride = min(max(logits.stride(0), n_cols), -(-n_cols // 128) * 128)
    return torch.empty((n_rows, stride), dtype=logits.dtype, device=logits.device)[:, :n_cols]


def _backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    statistics: torch.Tensor,
    n_counted: torch.Tensor,
) -> torch.Tensor:
    dlogits = _empty_like_rows(logits)
    tensors = logits, targets, dlogits, statistics, dloss, n_counted
    _launch(_cross_entropy_bwd_kernel, tensors, dlogits.stride(0), logits.shape[1], ignore_index)
    return dlogits


def _backward_(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    statistics: torch.Tensor,
    n_counted: torch.Tensor,
) -> None:
    """Write the gradient over the logits. Their new version makes autograd refuse any other use of them."""
    tensors = logits, targets, logits, statistics, dloss, n_counted
    _launch(_cross_entropy_bwd_kernel, tensors, logits.stride(0), logits.shape[1], ignore_index)
    torch.autograd.graph.increment_version(logits)


def _fake(logits, targets, ignore_index, inplace_backward):
    wide = launch.wide_dtype(logits.dtype)
    return tuple(logits.new_empty(shape, dtype=wide) for shape in ((), (logits.shape[0], 3), ()))


def _save(ctx, inputs, output):
    logits, targets, ctx.ignore_index, ctx.inplace_backward = inputs
    _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, *saved)


def _differentiate(ctx, dloss, *_):
    if dloss is None:
        return None, None, None, None
    logits, targets, *saved = ctx.saved_tensors
    if ctx.inplace_backward:
        _refuse_create_graph("cross_entropy with inplace_backward")
        _cross_entropy_backward_(dloss, logits, targets, ctx.ignore_index, *saved)
        return logits.detach(), None, None, None
    return _cross_entropy_backward(dloss, logits, targets, ctx.ignore_index, *saved), None, None, None


def _refuse_create_graph(op: str) -> None:
    """Autograd cannot trace these gradients back to the inputs, and would take second derivatives for zero."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} cannot be differentiated twice; for create_graph=True use eager")


_cross_entropy_backward = register(
    "cross_entropy_backward", _backward, lambda dloss, logits, *others: _empty_like_rows(logits)
)
_cross_entropy_backward_ = register("cross_entropy_backward_", _backward_, lambda *args: None, mutates=("logits",))
_cross_entropy = register("cross_entropy", _forward, _fake, _save, _differentiate, visible=1)


def _matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: int = 0) -> None:
    """out = beta·out + a·b, summed in out's dtype, which may be wider than that of a and b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:  # on a CPU, torch's matmuls take one dtype
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _padded(n_cols: int) -> int:
    return -(-n_cols // ALIGNMENT) * ALIGNMENT


def chunk_rows(n_rows: int, n_cols: int, width: int, itemsize: int, beside: int) -> int:
    """Number of rows of logits that the tied head has in memory at a time.

    Args:
        n_rows: rows of all logits.
        n_cols: V.
        width: C.
        itemsize: bytes per logit.
        beside: bytes that the head needs besides the chunk and the gradients.

    Returns:
        As many as PEAK_FRACTION and CHUNK_BUDGET allow, but at least C, or half of all: with fewer, accumulating
        dweight would move more bytes (8·V·C) than the chunk. Below about 16·C rows of 16 bits that minimum exceeds
        PEAK_FRACTION, but so does the copy of dweight in backward. A multiple of CHUNK_BLOCK, or all rows if fewer.
    """
    budget = min(CHUNK_BUDGET, n_rows * n_cols * itemsize // PEAK_FRACTION - beside)
    rows = max(budget // (_padded(n_cols) * itemsize), min(width, n_rows // 2), CHUNK_BLOCK)
    return min(rows // CHUNK_BLOCK * CHUNK_BLOCK, n_rows)


def _linear_forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, needs_dhidden: bool, needs_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dhidden, dweight, n_counted). Gradients lack the factor dloss/(n_counted·GRADIENT_SCALE), and are empty if
    not needed."""
    (n_rows, width), n_cols = hidden.shape, weight.shape[0]
    wide = launch.wide_dtype(hidden.dtype)
    losses = hidden.new_empty(n_rows, dtype=wide)
    dhidden = hidden.new_empty(hidden.shape if needs_dhidden else 0, dtype=wide)
    dweight = hidden.new_empty(weight.shape if needs_dweight else 0, dtype=wide)
    beside = losses.nbytes + max(dhidden.nbytes - hidden.nbytes, 0) + max(dweight.nbytes - weight.nbytes, 0)
    if weight.dtype != hidden.dtype:
        weight = weight.to(hidden.dtype)
        beside += weight.nbytes
    chunk = chunk_rows(n_rows, n_cols, width, hidden.element_size(), beside)
    buffer = torch.empty((chunk, _padded(n_cols)), dtype=hidden.dtype, device=hidden.device)[:, :n_cols]
    for start in range(0, n_rows, chunk or 1):
        rows = slice(start, min(start + chunk, n_rows))
        logits = buffer[: rows.stop - start]
        _matmul(logits, hidden[rows], weight.t())
        _launch(
            _linear_cross_entropy_kernel,
            (logits, targets[rows], losses[rows]),
            n_cols,
            IGNORE_INDEX,
            GRADIENT_SCALE,
            HAS_GRADIENT=needs_dhidden or needs_dweight,
        )
        if needs_dhidden:
            _matmul(dhidden[rows], logits, weight)
        if needs_dweight:
            _matmul(dweight, logits.t(), hidden[rows], beta=int(start > 0))
    if n_rows == 0:
        dweight.zero_()
    loss, n_counted = _mean(losses, targets, n_cols, IGNORE_INDEX)
    return loss, dhidden, dweight, n_counted


def _linear_backward(
    dloss: torch.Tensor,
    dhidden: torch.Tensor,
    dweight: torch.Tensor,
    n_counted: torch.Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the gradients that forward computed. Out of place, because backward may run again."""
    scale = dloss / (n_counted * GRADIENT_SCALE)
    dhidden = torch.mul(dhidden, scale, out=torch.empty_like(dhidden, dtype=hidden_dtype))
    dweight = torch.mul(dweight, scale, out=torch.empty_like(dweight, dtype=weight_dtype))
    return dhidden, dweight


def _linear_fake(hidden, weight, targets, needs_dhidden, needs_dweight):
    wide = launch.wide_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if needs_dhidden else 0, dtype=wide),
        hidden.new_empty(weight.shape if needs_dweight else 0, dtype=wide),
        hidden.new_empty((), dtype=wide),
    )


def _linear_backward_fake(dloss, dhidden, dweight, n_counted, hidden_dtype, weight_dtype):
    return torch.empty_like(dhidden, dtype=hidden_dtype), torch.empty_like(dweight, dtype=weight_dtype)


def _save_linear(ctx, inputs, output):
    hidden, weight, _, *ctx.needs = inputs
    _, *saved = output
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.set_materialize_grads(False)  # otherwise backward would get zeros of the size of dweight
    ctx.save_for_backward(*saved)


def _differentiate_linear(ctx, dloss, *_):
    if dloss is None:
        return None, None, None, None, None
    _refuse_create_graph("linear_cross_entropy")
    grads = _linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.dtypes)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True)), None, None, None


_linear_cross_entropy_backward = register("linear_cross_entropy_backward", _linear_backward, _linear_backward_fake)
_linear_cross_entropy = register(
    "linear_cross_entropy", _linear_forward, _linear_fake, _save_linear, _differentiate_linear, visible=1
)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE_INDEX, inplace_backward: bool = False
) -> torch.Tensor:
    """Mean cross-entropy over the targets that are not ignore_index.

    Args:
        logits: (..., V), fp32, fp16 or bf16 (fp64 for gradcheck). Rows may be padded: a slice `padded[..., :V]` is not
            copied, and its padding is neither read nor written, forward or backward.
        targets: (...) integers, each ignore_index (ignored) or in [0, V).
        ignore_index: the target to ignore.
        inplace_backward: backward may overwrite the logits with their gradient. If something else needs them later,
            such as a second backward, autograd raises an error. Without effect under torch.func.

    Returns:
        () loss in nats, fp32 for any logits (fp64 for fp64), where torch's own would round to 16 bits. If all targets
        are ignored, it is NaN and the gradient zero. The gradient has the dtype of the logits.

    Raises:
        ValueError: targets do not have the shape of the rows, or a tensor has another dtype or device.
        IndexError: a target is out of range. On a GPU a device-side assertion fails instead, since raising here would
            cost a synchronisation.
    """
    check("cross_entropy", {"logits": logits}, {"targets": targets})
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"{tuple(logits.shape)} logits need {tuple(logits.shape[:-1])} targets, not {tuple(targets.shape)}"
        )
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
        rows = rows.contiguous()
    inplace_backward = inplace_backward and not transformed()
    return _cross_entropy(rows, targets.reshape(-1).contiguous(), ignore_index, inplace_backward)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of the tied head, cross_entropy(hidden·weightᵀ, targets), without all logits in memory.

    The gradients of hidden and weight are computed together with the loss, each only if it requires one and gradients
    are enabled.

    Args:
        hidden: (..., C), fp32, fp16 or bf16 (fp64 for gradcheck).
        weight: (V, C), same dtype. Autocast casts both: weight once, and its gradient, in its own dtype, is summed in
            fp32 over all rows and never rounded to 16 bits in between.
        targets: (...) integers, each −1 (ignored) or in [0, V).

    Returns:
        () loss in nats, fp32 (fp64 for fp64). If all targets are ignored, it is NaN and the gradients are zero.

    Raises:
        ValueError: shapes do not match, dtypes do not match without autocast, or a tensor has another dtype or device.
        IndexError: as in `cross_entropy`.
    """
    check("linear_cross_entropy", {"hidden": hidden, "weight": weight}, {"targets": targets})
    if targets.shape != hidden.shape[:-1] or weight.shape[1:] != hidden.shape[-1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, weight, targets))
        raise ValueError(f"shapes {shapes} are not (..., C), (V, C) and (...)")
    dtype = autocast_dtype(hidden.device, hidden.dtype)
    if autocast_dtype(weight.device, weight.dtype) != dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; without autocast they must be the same")
    hidden = hidden.to(dtype)
    if transformed():  # it does not say which gradients it needs
        return cross_entropy(F.linear(hidden, weight.to(hidden.dtype)), targets)
    needs_dhidden, needs_dweight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return _linear_cross_entropy(hidden, weight, targets.reshape(-1).contiguous(), needs_dhidden, needs_dweight)


def forward_cost(n_rows: int, n_cols: int, itemsize: int) -> Cost:
    """`cross_entropy`: reads logits and targets; writes losses and statistics."""
    return Cost(n_rows * (n_cols * itemsize + 8 + 4 * 4), 5 * n_rows * n_cols)


def backward_cost(n_rows: int, n_cols: int, itemsize: int) -> Cost:
    """`cross_entropy`: reads logits, targets and statistics; writes the gradient, in place or not."""
    return Cost(n_rows * (2 * n_cols * itemsize + 8 + 3 * 4), 5 * n_rows * n_cols)


def linear_forward_cost(n_rows: int, n_cols: int, width: int, itemsize: int, weight_itemsize: int) -> Cost:
    """`linear_cross_entropy` with both gradients: reads hidden, weight and targets; writes losses and both gradients in
    fp32. The traffic of the chunks of logits is not compulsory. FLOPs: three matmuls and the softmax."""
    read = n_rows * (width * itemsize + 8) + n_cols * width * weight_itemsize
    written = 4 * (n_rows + n_rows * width + n_cols * width)
    return Cost(read + written, 6 * n_rows * n_cols * width + 10 * n_rows * n_cols)


def linear_backward_cost(n_rows: int, n_cols: int, width: int, itemsize: int, weight_itemsize: int) -> Cost:
    """`linear_cross_entropy`: reads both gradients in fp32, writes them in the dtypes of hidden and weight."""
    return Cost(width * (n_rows * (4 + itemsize) + n_cols * (4 + weight_itemsize)), width * (n_rows + n_cols))
