"""Launch parameters as data: block sizes, warps and stages by op, shape, dtype and compute capability.

Nothing is tuned at run time: all ranks launch the same programs, and every run gives the same bits. A new GPU is a few
rows here. Where a row was measured, bench/results says so; the others follow from what the machine code needs of
registers and shared memory (`python -m bench resources`).

Two kinds of calls spill registers in every row that was tried. LayerNorm of more than 8,192 columns: backward up to 430
bytes per thread, since with both sums, the weight, x and dy it has five fp32 numbers per column, and a multiprocessor
has 65,536 registers; forward up to 64. Attention in 16 bits, up to 112 bytes, where T is no multiple of the tiles and
head_dim, such as 80, is one of 16 and no power of two. Where head_dim or T is odd, a few other kernels spill 8 or 16
bytes.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.dispatch import PLAIN


class LaunchConfig(NamedTuple):
    """A row: launch parameters, and the calls that they are for."""

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
    max_registers: int | None = None
    """a thread's, where a few fewer make room for another program on a multiprocessor and nothing spills"""
    unaligned: bool = False
    """whether it is for widths that 16 does not divide: each element has an address of its own, in registers"""


ANY = 1 << 62
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)

# (capability from which on it holds, multiprocessors of its largest chip), newest first
MULTIPROCESSORS = ((100, 148), (90, 132), (0, 108))

# In 16 bits on sm_80. They fit the 99 KiB of shared memory of sm_86 and sm_89, and of sm_120, which has sm_80's matrix
# instructions.
ATTENTION_80 = (
    LaunchConfig("attention", 80, 64, 2, 128, 64, 8, 3),
    LaunchConfig("attention", 80, 128, 2, 128, 64, 8, 2),
    LaunchConfig("attention_dq", 80, 64, 2, 64, 64, 4, 3),
    LaunchConfig("attention_dq", 80, 128, 2, 64, 64, 4, 2),
    LaunchConfig("attention_dkdv", 80, 64, 2, 32, 64, 4, 3),
    LaunchConfig("attention_dkdv", 80, 128, 2, 64, 64, 8, 2),
)

# The first row that fits is taken.
CONFIGS = (
    # A tile of 8192 elements in registers and the next one on its way; backward half as many, since the sums of dw and
    # db are in registers too. At most 99 KiB of shared memory with any dtypes, which is what the smaller GPUs have.
    *(LaunchConfig("layer_norm", 0, width, 4, 8192 // width, 0, 16, 2) for width in WIDTHS),
    LaunchConfig("layer_norm", 0, 16384, 8, 1, 0, 32, 1),
    *(LaunchConfig("layer_norm_backward", 0, width, 4, 4096 // width, 0, 16, 3) for width in WIDTHS[:-1]),
    LaunchConfig("layer_norm_backward", 0, 8192, 4, 1, 0, 16, 2),
    LaunchConfig("layer_norm_backward", 0, 10240, 8, 1, 0, 16, 1),
    LaunchConfig("layer_norm_backward", 0, 16384, 8, 1, 0, 32, 1),
    LaunchConfig("layer_norm_partials", 0, ANY, 8, 64, 32, 4, 1),
    LaunchConfig("embedding", 0, ANY, 8, 8, 256, 4, 1),
    LaunchConfig("gelu", 0, ANY, 8, 1, 1024, 4, 1),
    # Attention takes block_m queries and block_n keys at a time. Nothing spills in 16 bits, and on sm_90 nothing makes
    # ptxas run wgmma one by one (it says so, in a warning that Triton swallows). Within that, at head_dim 64, two
    # programs on a multiprocessor, so that one multiplies while the other one exponentiates; and 128 queries where keys
    # and values come from L2, since 64 read them twice as often. In fp32 and fp64 all three have the same tiles: then
    # backward makes the scores in the bits that forward normalised, though the order of summing may follow the shape.
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
    LaunchConfig("attention_dkdv", 90, 64, 2, 64, 64, 4, 3),
    LaunchConfig("attention_dkdv", 90, 128, 2, 64, 128, 8, 3),
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
    # By its registers, two or three programs on a multiprocessor where a row is read twice, the second time from L2: at
    # most 396 rows of GPT-2's vocabulary in 16 bits on an H100, 40 MB.
    LaunchConfig("cross_entropy", 0, ANY, 8, 1, 8192, 16, 1),
)


def lookup(op: str, device: torch.device, itemsize: int, width: int = 1) -> LaunchConfig:
    """The row for a call.

    Args:
        op: a name in CONFIGS.
        device: where the tensors are.
        itemsize: bytes of an element of the tensors that it reads most of.
        width: head_dim or n_cols.

    Raises:
        ValueError: no row is that wide.
    """
    trial = _trial and _trial.configs.get(op)
    return trial or _first_config(op, capability(device), itemsize, width)


@functools.cache
def _first_config(op: str, at: int, itemsize: int, width: int) -> LaunchConfig:
    for config in CONFIGS:
        fits = at >= config.capability and width <= config.width and itemsize <= config.itemsize
        if config.op == op and fits and (width % 16 or not config.unaligned):
            return config
    widest = max(config.width for config in CONFIGS if config.op == op)
    raise ValueError(f"{op} takes at most {widest} columns, and was given {width}")


def n_programs(device: torch.device) -> int:
    """How many programs share the rows where each takes many of them: one a multiprocessor.

    A constant of the capability and not asked of the GPU: each program makes a partial sum, and with other partial sums
    two boards of a kind would give other bits.
    """
    at = capability(device)
    return next(count for at_least, count in MULTIPROCESSORS if at >= at_least)


def capability(device: torch.device) -> int:
    """90 for an H100; 0 where there is no GPU."""
    return _dry_run.capability if _dry_run else _capability(device)


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fp32_dot_precision() -> str:
    """What `tl.dot` does with fp32: "tf32" where torch's own CUDA matmuls do it, else "ieee".

    Reads the setting that torch gives cuBLAS, whichever of its setters made it. `torch.get_float32_matmul_precision`
    raises once the newer setters were used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """What a kernel computes in: fp32, and fp64 on fp64 inputs, so that gradcheck can look at it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def cdiv(n: int, d: int) -> int:
    """n/d, rounded up. Triton's own, which kernels call too, takes 5 µs on the host."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


class Call(NamedTuple):
    """What `run` would have launched."""

    kernel: triton.JITFunction
    args: dict[str, Any]
    """every parameter of the kernel by name, constexprs too"""
    options: dict[str, int | None]
    """num_warps, num_stages, maxnreg"""
    grid: tuple[int, ...]


class DryRun:
    """`with DryRun(90, calls.append):` launches nothing in this block, and notes what a GPU of that compute capability
    would be given. What the kernels would have written is left as it was."""

    def __init__(self, capability: int, note: Callable[[Call], None]):
        self.capability, self.note = capability, note

    def __enter__(self) -> None:
        global _dry_run
        self._outer, _dry_run = _dry_run, self

    def __exit__(self, *_: object) -> None:
        global _dry_run
        _dry_run = self._outer


class Trial:
    """`with Trial(config):` launches the op of each config with it, whatever the table says: for the tuner and tests.

    One that is entered again finds its compiled kernels.
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
"""entries; lengths of sequences that all differ, as in sampling, would fill the memory"""


def run(
    kernel: triton.JITFunction,
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[int | float | None],
    configure: Callable[[], tuple[tuple[int, ...], dict[str, Any]]],
    also: Hashable = None,
) -> bool:
    """Launch `kernel[grid](*tensors, *numbers, **constants)` on the device of the first tensor.

    Triton finds out at each launch what it knows already: whether it has compiled for such arguments. Here what it
    looks at, the numbers and the dtypes and alignments of tensors, is the key to what was launched for the same before.

    Args:
        kernel: its parameters are tensors, then numbers, then constexprs.
        tensors: the first one is not None.
        numbers: sizes and strides.
        configure: grid and constants, which are constexprs and options such as num_warps. They follow from dtypes,
            numbers, capability and `also`.
        also: whatever else they follow from.

    Returns:
        Whether it was launched: False in a dry run.
    """
    if _dry_run:
        grid, constants = configure()
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
    if type(first) in PLAIN:  # not a fake one, with which launches are counted
        pointers = [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]
        dtypes = [tensor is None or tensor.dtype for tensor in tensors]
        key = (id(kernel), index, also, *numbers, *dtypes, *[pointer and pointer % 16 for pointer in pointers])
        launch_again = _compiled.get(key)
        if launch_again:
            launch_again(pointers, numbers)
            return True
    grid, constants = configure()
    compiled = kernel[grid](*tensors, *numbers, **constants)
    if key and compiled is not None:  # the interpreter has nothing to keep
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        constexprs = [constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        _compiled[key] = _launcher(compiled, grid, max(index, 0), constexprs)
    return True


def _launcher(compiled: Any, grid: tuple[int, ...], device: int, constexprs: list) -> Callable:
    """A function that launches what the JIT compiled, as the JIT does, with other pointers; Triton's profiler is not
    told."""
    before = (compiled.function, compiled.packed_metadata, None, None, None)
    grid = (*grid, 1, 1)[:3]
    launch, stream_of = compiled.run, triton.runtime.driver.active.get_current_stream

    def launch_again(pointers: Sequence[int | None], numbers: Sequence[int | float | None]) -> None:
        launch(*grid, stream_of(device), *before, *pointers, *numbers, *constexprs)

    return launch_again
