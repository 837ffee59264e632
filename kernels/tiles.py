"""Tiles of the heads of attention: where they are, how they are read, multiplied and written. Kernels call these."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def pointers(ptr, b, h, offs_row, offs_d, stride_b, stride_h, stride_row, stride_d):
    """(rows, BLOCK_D) pointers into head h of sequence b."""
    rows = ptr + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + offs_row.to(tl.int64)[:, None] * stride_row
    return rows + offs_d.to(tl.int64)[None, :] * stride_d


@triton.jit
def load(ptrs, offs_row, T, offs_d, EVEN_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile, zero beyond T and HEAD_DIM. Masked only if it may reach there."""
    if EVEN_ROWS and HEAD_DIM == BLOCK_D:
        tile = tl.load(ptrs)
    elif EVEN_ROWS:
        tile = tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        tile = tl.load(ptrs, mask=offs_row[:, None] < T, other=0.0)
    else:
        tile = tl.load(ptrs, mask=(offs_row[:, None] < T) & (offs_d[None, :] < HEAD_DIM), other=0.0)
    return tile


@triton.jit
def operand(x, INPUT_PRECISION: tl.constexpr):
    """x as an operand of a product. For TF32, tensor cores drop the last 13 bits of fp32, which biases every product
    towards zero. So round first, to nearest, ties away from zero, as cuBLAS does. ptxas compiles this to the same three
    instructions as cvt.rna.tf32, which the interpreter lacks. Infinity and NaN are unchanged."""
    if INPUT_PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(tl.abs(x) < float("inf"), tl.add(bits, 0x1000, sanitize_overflow=False), bits)
        x = (bits & 0xFFFFE000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """acc + a·b; acc may be None."""
    a = operand(a, INPUT_PRECISION)
    b = operand(b, INPUT_PRECISION)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=COMPUTE_DTYPE)


@triton.jit
def load_row(ptrs, offs_row, T, EVEN_ROWS: tl.constexpr):
    """One number per row, zero beyond T."""
    return tl.load(ptrs) if EVEN_ROWS else tl.load(ptrs, mask=offs_row < T, other=0.0)


@triton.jit
def store(ptrs, tile, offs_row, T, offs_d, HEAD_DIM: tl.constexpr):
    mask = (offs_row[:, None] < T) & (offs_d[None, :] < HEAD_DIM)
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=mask)
