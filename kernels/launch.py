"""Launch parameters as data: block sizes, warps and stages by op, shape, dtype and compute capability.

Nothing is tuned at run time: all ranks launch the same programs, and runs are bitwise identical. A new GPU needs a few
rows here. bench/results says which rows were measured; the others follow from the registers and shared memory that the
machine code needs.

Attention in 16 bits spills registers with every configuration that was tried, up to 112 bytes per thread, where T is
not a multiple of the tiles and head_dim is a multiple of 16 but not a power of two, such as 80. A few other kernels
spill 8 or 16 bytes where head_dim, T or a width is odd, or in LayerNorm's backward of 4,097 to 8,192 columns.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.dispatch import PLAIN


class LaunchConfig(NamedTuple):
    """Launch parameters, and the calls that they apply to."""

    op: str
    capability: int
    """lowest compute capability, 90 for 9.0; 0 for the interpreter, and for GPUs without a row of their own"""
    width: int
    """largest head_dim or n_cols"""
    itemsize: int
    """largest size of an element, in bytes"""
    block_m: int
    """rows per program and step"""
    block_n: int
    """columns, keys or elements per program and step; 0 for all, rounded up to a power of two"""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """limit per thread, where a few fewer let another program run on the same multiprocessor without spills"""
    unaligned: bool = False
    """only for widths that 16 does not divide, where the address of each element takes registers"""
    programs: int = 1
    """per multiprocessor, of a kernel whose programs share the rows"""


FP_FUSION = {"enable_fp_fusion": True}
"""Every launch says that a·b + c is rounded once. Triton 3.9 warns if a launch leaves it open, and 3.10 turns it off:
sums would then differ in their last bits from version to version."""
ANY = 1 << 62
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDEST_TILE = WIDTHS[-1]
"""of rows that LayerNorm holds in registers; the kernels of kernels/wide_layer_norm.py take wider ones"""

# (lowest compute capability, multiprocessors of its largest common GPU), newest first: of the RTX 5090, B200, H100, RTX
# 4090, A6000 and A100. Programs beyond these would wait for a second turn.
MULTIPROCESSORS = ((120, 170), (100, 148), (90, 132), (89, 128), (86, 84), (0, 108))

# For 16 bits on sm_80. They fit the 99 KiB of shared memory of sm_86, sm_89 and sm_120, which has sm_80's matrix
# instructions.
ATTENTION_80 = (
    LaunchConfig("attention", 80, 64, 2, 64, 64, 4, 3, max_registers=168),
    LaunchConfig("attention", 80, 128, 2, 128, 64, 8, 2),
    LaunchConfig("attention_dq", 80, 64, 2, 64, 32, 4, 3, max_registers=168),
    LaunchConfig("attention_dq", 80, 128, 2, 64, 64, 4, 2),
    LaunchConfig("attention_dkdv", 80, 64, 2, 32, 64, 4, 3),
    LaunchConfig("attention_dkdv", 80, 128, 2, 64, 64, 8, 2),
)

# The first row that applies is used.
CONFIGS = (
    # Forward: two programs per multiprocessor, each with a tile of 4096 elements in registers while the next one is
    # loaded, which takes three stages: with two there is one buffer. Two fit if a thread has at most 128 registers
    # (without that limit ptxas aims at 64, and sometimes spills), and in 16 bits into 100 KiB of shared memory.
    # Backward has one program, since each writes partial sums, and a tile of 4096 elements, since the sums of dw and db
    # are in registers too. With any dtypes a program has at most 99 KiB, the limit of the smaller GPUs.
    *(LaunchConfig("layer_norm", 0, width, 4, 4096 // width, 0, 8, 3, 128, programs=2) for width in WIDTHS[:-1]),
    LaunchConfig("layer_norm", 0, 8192, 4, 1, 0, 16, 2),
    LaunchConfig("layer_norm", 0, WIDEST_TILE, 8, 1, 0, 32, 1),
    *(LaunchConfig("layer_norm_backward", 0, width, 4, 4096 // width, 0, 16, 3) for width in WIDTHS[:-1]),
    LaunchConfig("layer_norm_backward", 0, 8192, 4, 1, 0, 16, 2),
    LaunchConfig("layer_norm_backward", 0, WIDEST_TILE, 8, 1, 0, 32, 1),
    # Wide rows, in blocks of columns.
    LaunchConfig("layer_norm_backward", 0, ANY, 4, 4, 1024, 16, 3),
    LaunchConfig("layer_norm_backward", 0, ANY, 8, 4, 1024, 16, 1),
    LaunchConfig("wide_layer_norm", 0, ANY, 4, 1, 2048, 8, 3, 255),
    LaunchConfig("wide_layer_norm", 0, ANY, 8, 1, 2048, 8, 1),
    LaunchConfig("embedding", 0, ANY, 8, 8, 256, 4, 1),
    LaunchConfig("column_sums", 70, ANY, 8, 64, 32, 4, 1),
    # For the interpreter, where a program of 512 columns takes about twice the time of one of 32. A column has the same
    # sum with any block_n.
    LaunchConfig("column_sums", 0, ANY, 8, 64, 512, 4, 1),
    LaunchConfig("gelu", 0, ANY, 8, 1, 1024, 4, 1),
    LaunchConfig("gelu_dbias", 0, ANY, 8, 4, 1024, 8, 2),
    # Attention takes block_m queries and block_n keys per step. In 16 bits nothing spills, and on sm_90 ptxas does not
    # serialise wgmma (it warns if it does, but Triton hides the warning). Within these limits: at head_dim 64 two
    # programs per multiprocessor, so that one multiplies while the other computes exponentials; and 128 queries, since
    # with 64 keys and values would be read from L2 twice as often. In fp32 and fp64 all three kernels have the same
    # tiles: the order of a sum may depend on them, and backward has to recompute the very scores of forward.
    LaunchConfig("attention", 80, 128, 2, 32, 32, 4, 2, unaligned=True),
    LaunchConfig("attention", 80, 64, 4, 32, 32, 8, 1, unaligned=True),
    LaunchConfig("attention_dq", 80, 128, 2, 32, 32, 8, 2, unaligned=True),
    LaunchConfig("attention_dq", 80, 64, 4, 32, 32, 8, 2, unaligned=True),
    LaunchConfig("attention_dkdv", 80, 64, 2, 32, 32, 8, 2, unaligned=True),
    LaunchConfig("attention_dkdv", 80, 128, 2, 16, 32, 8, 2, unaligned=True),
    *(config._replace(capability=120) for config in ATTENTION_80),
    LaunchConfig("attention", 100, 64, 2, 128, 64, 4, 3),
    LaunchConfig("attention", 100, 128, 2, 128, 64, 8, 2),
    LaunchConfig("attention", 90, 64, 2, 128, 64, 8, 3, max_registers=128),
    LaunchConfig("attention", 90, 128, 2, 128, 64, 8, 3),
    LaunchConfig("attention_dq", 100, 128, 2, 128, 64, 8, 2),
    LaunchConfig("attention_dq", 90, 64, 2, 128, 64, 8, 3, max_registers=128),
    LaunchConfig("attention_dq", 90, 128, 2, 128, 64, 8, 3),
    LaunchConfig("attention_dkdv", 100, 128, 2, 64, 128, 8, 2),
    LaunchConfig("attention_dkdv", 90, 64, 2, 32, 128, 8, 3, max_registers=128),
    LaunchConfig("attention_dkdv", 90, 128, 2, 32, 128, 8, 3),
    *ATTENTION_80,
    LaunchConfig("attention", 0, 64, 2, 64, 64, 4, 2),
    LaunchConfig("attention", 0, 128, 2, 64, 32, 4, 2),
    LaunchConfig("attention", 0, 64, 4, 32, 32, 4, 2),
    LaunchConfig("attention", 0, 128, 4, 16, 32, 8, 2),
    LaunchConfig("attention", 0, 128, 8, 16, 16, 4, 1),
    LaunchConfig("attention_dq", 0, 128, 2, 64, 32, 4, 2),
    LaunchConfig("attention_dq", 0, 64, 4, 32, 32, 4, 2),
    LaunchConfig("attention_dq", 0, 128, 4, 16, 32, 8, 2),
    LaunchConfig("attention_dq", 0, 128, 8, 16, 16, 4, 1),
    LaunchConfig("attention_dkdv", 0, 128, 2, 32, 64, 4, 2),
    LaunchConfig("attention_dkdv", 0, 64, 4, 32, 32, 8, 2),
    LaunchConfig("attention_dkdv", 0, 128, 4, 16, 32, 8, 1),
    LaunchConfig("attention_dkdv", 0, 128, 8, 16, 16, 4, 1),
    # Registers allow two or three programs per multiprocessor. A row is read twice, the second time from L2: on an H100
    # at most 396 rows of GPT-2's vocabulary in 16 bits, 40 MB.
    LaunchConfig("cross_entropy", 0, ANY, 8, 1, 8192, 16, 1),
    # block_n keys per program, all loaded at once: 8 or 16 KiB of keys, and as many of values. Fewer would leave more
    # to the second kernel, which takes block_m of their sums per step; more would be too few programs for B = 1.
    LaunchConfig("decode_attention", 0, 128, 2, 32, 64, 4, 1),
    LaunchConfig("decode_attention", 0, 128, 8, 32, 32, 4, 1),
)


def lookup(op: str, device: torch.device, itemsize: int, width: int = 1) -> LaunchConfig:
    """The configuration of a call.

    Args:
        op: a name in CONFIGS.
        device: device of the tensors.
        itemsize: bytes per element of the largest tensors that the op reads.
        width: head_dim or n_cols.

    Raises:
        ValueError: no row applies.
    """
    trial = _trial and _trial.configs.get(op)
    return trial or _first_config(op, capability(device), itemsize, width)


@functools.cache
def _first_config(op: str, at: int, itemsize: int, width: int) -> LaunchConfig:
    for config in CONFIGS:
        fits = at >= config.capability and width <= config.width and itemsize <= config.itemsize
        if config.op == op and fits and (width % 16 or not config.unaligned):
            return config
    raise ValueError(
        f"no launch configuration of {op} for compute capability {at}, width {width} and itemsize {itemsize}; add a "
        "row to CONFIGS in kernels/launch.py"
    )


def n_programs(device: torch.device) -> int:
    """Number of multiprocessors, each of which gets one program, or `programs` of the configuration, if programs share
    the rows of a call.

    It depends on the compute capability alone. Each program adds a partial sum, so two boards of one generation with
    different numbers of multiprocessors would otherwise differ in the last bits.
    """
    at = capability(device)
    return next(count for at_least, count in MULTIPROCESSORS if at >= at_least)


def capability(device: torch.device) -> int:
    """Compute capability: 90 for an H100, 0 without a GPU."""
    return _dry_run.capability if _dry_run else _capability(device)


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fp32_dot_precision() -> str:
    """Precision of `tl.dot` on fp32: "tf32" if torch's own CUDA matmuls use it, else "ieee".

    Reads the setting that cuBLAS gets, whichever setter was used. `torch.get_float32_matmul_precision` raises after one
    of the newer setters.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which a kernel computes: fp32, or fp64 for fp64 inputs, for gradcheck."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """torch's name of `compute_dtype`."""
    return torch.promote_types(dtype, torch.float32)


def require(is_valid: torch.Tensor, message: str) -> None:
    """Check a flag that a kernel wrote, () int32.

    Raises:
        IndexError: it is 0, without a GPU. On a GPU a device-side assertion fails, which raises at the next
            synchronisation: to raise here would cost one.
    """
    if capability(is_valid.device):
        torch._assert_async(is_valid, message)
    elif not is_valid:
        raise IndexError(message)


def cdiv(n: int, d: int) -> int:
    """n/d, rounded up. Triton's own function takes 5 µs on the host."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


class Call(NamedTuple):
    """A launch that a dry run recorded."""

    kernel: triton.JITFunction
    args: dict[str, Any]
    """every parameter of the kernel by name, including constexprs"""
    options: dict[str, int | None]
    """num_warps, num_stages, maxnreg"""
    grid: tuple[int, ...]


class DryRun:
    """In `with DryRun(90, calls.append):` nothing is launched. The launches that a GPU of that compute capability would
    get are recorded; the tensors that they would write are left unchanged."""

    def __init__(self, capability: int, note: Callable[[Call], None]):
        self.capability, self.note = capability, note

    def __enter__(self) -> None:
        global _dry_run
        self._outer, _dry_run = _dry_run, self

    def __exit__(self, *_: object) -> None:
        global _dry_run
        _dry_run = self._outer


class Trial:
    """In `with Trial(config):` the op of each config is launched with that config instead of the table's.

    For the tuner and tests. A Trial keeps its compiled kernels, and can be entered again.
    """

    def __init__(self, *configs: LaunchConfig):
        self.configs = {config.op: config for config in configs}
        self._compiled: dict[tuple, Callable] = {}

    def __enter__(self) -> None:
        global _trial, _compiled
        self._outer = _trial, _compiled
        _trial, _compiled = self, self._compiled

    def __exit__(self, *_: object) -> None:
        global _trial, _compiled
        _trial, _compiled = self._outer


_dry_run: DryRun | None = None
_trial: Trial | None = None
_compiled: dict[tuple, Callable] = {}
_MOST_COMPILED = 4096
"""entries; sequences of ever new lengths, as in sampling, would fill the memory"""


def run(
    kernel: triton.JITFunction,
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[int | float | None],
    configure: Callable[[], tuple[tuple[int, ...], dict[str, Any]]],
    also: Hashable = None,
) -> bool:
    """Launch `kernel[grid](*tensors, *numbers, **constants)` on the device of the first tensor.

    At each launch Triton looks up whether it has compiled the kernel for such arguments. That is slow, so compiled
    kernels are also kept here, by what Triton specialises on: numbers, and dtypes and alignments of tensors.

    Args:
        kernel: its parameters are tensors, then numbers, then constexprs.
        tensors: the first one is not None.
        numbers: sizes and strides.
        configure: returns grid and constants (constexprs, and options such as num_warps). They may depend on dtypes,
            numbers, capability and `also` only.
        also: anything else that they depend on.

    Returns:
        Whether it was launched: False in a dry run.
    """
    if _dry_run:
        grid, constants = configure()
        constants = constants | FP_FUSION
        names = kernel.arg_names
        args = dict(zip(names, (*tensors, *numbers), strict=False))
        args |= {name: value for name, value in constants.items() if name in names}
        options = {name: value for name, value in constants.items() if name not in names}
        _dry_run.note(Call(kernel, args, options, grid))
        return False
    first = tensors[0]
    assert first is not None
    index = first.get_device()  # -1 without a GPU
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return run(kernel, tensors, numbers, configure, also)
    key = None
    if type(first) in PLAIN:  # fake tensors, with which launches are counted, have no memory
        pointers = [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]
        dtypes = [tensor is None or tensor.dtype for tensor in tensors]
        key = (id(kernel), index, also, *numbers, *dtypes, *[pointer and pointer % 16 for pointer in pointers])
        launch_again = _compiled.get(key)
        if launch_again:
            launch_again(pointers, numbers)
            return True
    grid, constants = configure()
    compiled = kernel[grid](*tensors, *numbers, **constants, **FP_FUSION)
    if key and compiled is not None:  # the interpreter compiles nothing
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        constexprs = [constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        _compiled[key] = _launcher(compiled, grid, max(index, 0), constexprs)
    return True


def _launcher(compiled: Any, grid: tuple[int, ...], device: int, constexprs: list) -> Callable:
    """A function that launches a compiled kernel with other pointers, as the JIT does; Triton's profiler misses it."""
    before = (compiled.function, compiled.packed_metadata, None, None, None)
    grid = (*grid, 1, 1)[:3]
    launch, stream_of = compiled.run, triton.runtime.driver.active.get_current_stream

    def launch_again(pointers: Sequence[int | None], numbers: Sequence[int | float | None]) -> None:
        launch(*grid, stream_of(device), *before, *pointers, *numbers, *constexprs)

    return launch_again
