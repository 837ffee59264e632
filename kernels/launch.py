"""Launch parameters as data: block sizes, warps and stages by op, shape, dtype and compute capability.

Nothing is tuned at run time: all ranks launch the same programs, and every run gives the same bits. A new GPU is a few
rows here. Where a row was measured, bench/results says so; the others follow from what `python -m bench.resources`
reports of registers and shared memory.
"""

from typing import NamedTuple

import torch
import triton.language as tl


class Row(NamedTuple):
    """Parameters, and the calls that they are for."""

    op: str
    capability: int
    """compute capability, ten times the major and once the minor number, from which on the row holds; 0: any GPU, and
    the interpreter"""
    width: int
    """head_dim or n_cols up to which it holds"""
    itemsize: int
    """bytes of an element up to which it holds"""
    block_m: int
    """rows a program takes at a time"""
    block_n: int
    """columns, keys or elements a program takes at a time; 0: all, rounded up to a power of two"""
    num_warps: int
    num_stages: int


ANY = 1 << 62

# The first row that fits is taken.
ROWS = (Row("gelu", 0, ANY, 8, 1, 1024, 4, 1),)


def lookup(op: str, device: torch.device, itemsize: int, width: int = 1) -> Row:
    """The row for a call.

    Args:
        op: a name in ROWS.
        device: where the tensors are.
        itemsize: bytes of an element of the tensors that it reads most of.
        width: head_dim or n_cols.

    Raises:
        ValueError: no row is that wide.
    """
    at = capability(device)
    for row in ROWS:
        if row.op == op and at >= row.capability and width <= row.width and itemsize <= row.itemsize:
            return row
    widest = max(row.width for row in ROWS if row.op == op)
    raise ValueError(f"{op} takes at most {widest} columns, and was given {width}")


def capability(device: torch.device) -> int:
    """90 for an H100; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fp32_dot_precision() -> str:
    """What `tl.dot` does with fp32: as torch's own matmuls, IEEE arithmetic unless TF32 was asked for."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """What a kernel computes in: fp32, and fp64 on fp64 inputs, so that gradcheck can look at it."""
    return tl.float64 if dtype == torch.float64 else tl.float32
