"""`python -m bench traffic`: the bytes that every kernel asks for, beside the compulsory bytes of its formula.

Counted in the interpreter, load by load and store by store; compulsory is each input once and each output once. Only
lanes that the mask lets through are counted. What caches make of it is not seen here: a second read of a row that is
still in L2 counts as a read.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch

from bench import pictures
from bench.chips import CHIPS, MIB
from bench.results import PREDICTED
from bench.tables import table
from kernels import interpreter
from kernels.cost import Cost

CHIP = CHIPS["H100"]
"""whose launch parameters the kernels get"""


class Traffic(NamedTuple):
    """What one call asks for."""

    op: str
    pass_name: str
    shape: str
    read: int
    """bytes"""
    written: int
    compulsory: int
    """bytes, by the op's formula"""
    limit: float
    """of asked over compulsory"""
    how: str = "counted"

    @property
    def ratio(self) -> float:
        """Asked over compulsory."""
        return (self.read + self.written) / self.compulsory


class Counts:
    """Bytes by kernel and argument, as long as `counting` is open.

    Attributes:
        read: (kernel, argument) -> bytes. Arguments that share memory count under the first of them.
        written: the same.
        products: kernel -> multiplications of all its `tl.dot`s, M·N·K each.
        programs: kernel -> number of programs.
    """

    def __init__(self):
        self.read: dict[tuple[str, str], int] = defaultdict(int)
        self.written: dict[tuple[str, str], int] = defaultdict(int)
        self.products: dict[str, int] = defaultdict(int)
        self.programs: dict[str, int] = defaultdict(int)
        self._kernel = ""
        self._ranges: list[tuple[int, int, str]] = []

    @property
    def bytes(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    def enter(self, kernel: str, args: dict) -> None:
        """From here on, accesses are those of this kernel."""
        self._kernel = kernel
        self._ranges = []
        for name, arg in args.items():
            if isinstance(arg, torch.Tensor):
                start = arg.untyped_storage().data_ptr()
                self._ranges.append((start, start + arg.untyped_storage().nbytes(), name))

    def access(self, counts: dict[tuple[str, str], int], pointers, mask) -> None:
        """Count one load or store."""
        addresses = pointers.data[mask.data.astype(bool)] if mask is not None else pointers.data.ravel()
        if addresses.size:
            address = int(addresses.flat[0])
            name = next((name for start, end, name in self._ranges if start <= address < end), "elsewhere")
            counts[self._kernel, name] += addresses.size * pointers.get_element_ty().primitive_bitwidth // 8


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what kernels do in this block, on top of what the interpreter was given before (kernels/interpreter.py)."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    counts = Counts()
    run, load, store, dot, program = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        InterpreterBuilder.create_dot,
        InterpreterBuilder.set_grid_idx,
    )

    def counted_run(self, *args, **kwargs):
        counts.enter(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return run(self, *args, **kwargs)

    def counted_load(self, pointers, mask, *rest):
        counts.access(counts.read, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        counts.access(counts.written, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        counts.products[counts._kernel] += a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def counted_program(self, *where):
        counts.programs[counts._kernel] += 1
        return program(self, *where)

    with (
        mock.patch.object(GridExecutor, "__call__", counted_run),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(InterpreterBuilder, "create_dot", counted_dot),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", counted_program),
    ):
        yield counts


def count(call: Callable[[], object]) -> Counts:
    """Count one call, with the launch parameters of the chip."""
    from kernels import launch

    lookup = launch.lookup

    def of_the_chip(*args, **kwargs) -> launch.LaunchConfig:
        with mock.patch.object(launch, "capability", lambda device: CHIP.capability):
            return lookup(*args, **kwargs)

    with mock.patch.object(launch, "lookup", of_the_chip), counting() as counts:
        call()
    return counts


def _both(function: Callable, *inputs: torch.Tensor | int) -> tuple[Counts, Counts]:
    """Count forward and backward of an op; all of its outputs get a gradient."""
    leaves = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]
    outs: list[torch.Tensor] = []

    def forward() -> None:
        out = function(*leaves)
        outs.extend([out] if isinstance(out, torch.Tensor) else out)

    counted = count(forward)
    gradients = [torch.ones_like(out, memory_format=torch.contiguous_format) for out in outs]
    return counted, count(lambda: torch.autograd.backward(outs, gradients))


def _rows(
    op: str, shape: str, counts: tuple[Counts, Counts], costs: Sequence[Cost], limits: tuple[float, float]
) -> Iterator[Traffic]:
    for pass_name, counted, cost, limit in zip(("forward", "backward"), counts, costs, limits, strict=True):
        read, written = (sum(of.values()) for of in (counted.read, counted.written))
        yield Traffic(op, pass_name, shape, read, written, cost.bytes, limit)


def gelu() -> Iterator[Traffic]:
    """Elementwise, with a last block that is not full."""
    from kernels import gelu

    n = 5000
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)).bfloat16()
    costs = [cost(n, 2) for cost in (gelu.forward_cost, gelu.backward_cost)]
    yield from _rows("gelu", f"{n}", _both(gelu.gelu, x), costs, (1.0, 1.0))


N_ROWS = 16384
"""to which the counts of LayerNorm are extrapolated"""


def count_layer_norm(n_rows: int, n_programs: int, n_cols: int, has_branch: bool) -> tuple[Counts, Counts]:
    """Forward and backward in bf16, by so many programs."""
    from kernels import launch
    from kernels import layer_norm as kernels

    generator = torch.Generator().manual_seed(n_rows)
    rows = [torch.randn(n_rows, n_cols, generator=generator).bfloat16() for _ in range(1 + has_branch)]
    weight, bias = (torch.randn(n_cols, generator=generator).bfloat16() for _ in range(2))
    with mock.patch.object(launch, "n_programs", lambda device: n_programs):
        return _both(kernels.add_layer_norm if has_branch else kernels.layer_norm, *rows, weight, bias)


def layer_norm(n_cols: int = 768) -> Iterator[Traffic]:
    """What a row costs, a program, and a call, from three small calls; then what N_ROWS rows cost on the whole chip."""
    from kernels import layer_norm as kernels

    for op, has_branch in (("layer_norm", False), ("add_layer_norm", True)):
        sizes = (2, 2, 2, 2 * has_branch)
        small, more_rows, more_programs = (
            count_layer_norm(*of, n_cols, has_branch) for of in ((32, 2), (64, 2), (64, 4))
        )
        costs = [cost(64, n_cols, *sizes) for cost in (kernels.forward_cost, kernels.backward_cost)]
        yield from _rows(op, f"64×{n_cols}", more_rows, costs, (float("inf"),) * 2)
        for i, (pass_name, cost, limit) in enumerate(
            (("forward", kernels.forward_cost, 1.01), ("backward", kernels.backward_cost, 1.05))
        ):
            asked = [
                extrapolate(*(sum(getattr(of[i], what).values()) for of in (small, more_rows, more_programs)))
                for what in ("read", "written")
            ]
            compulsory = cost(N_ROWS, n_cols, *sizes).bytes
            yield Traffic(op, pass_name, f"{N_ROWS}×{n_cols}", *asked, compulsory, limit, "extrapolated")


def extrapolate(small: int, more_rows: int, more_programs: int, n_rows: int = N_ROWS, n_programs: int = 0) -> int:
    """Bytes of n_rows rows by n_programs programs (0: the chip's), from those of (32, 2), (64, 2) and (64, 4)."""
    row, program = (more_rows - small) // 32, (more_programs - more_rows) // 2
    call = small - 32 * row - 2 * program
    return n_rows * row + (n_programs or CHIP.n_sms) * program + call


def attention(T: int = 1024, D: int = 64) -> Iterator[Traffic]:
    """Matrix products computed over those of the causal half: tiles on the diagonal are computed whole."""
    from bench.roofline import PRODUCTS
    from kernels import attention as kernels
    from kernels import launch

    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(1, T, 3 * D, generator=generator).bfloat16()
    forward, backward = _both(kernels.attention, qkv, 1)
    of_kernels = {
        "_attention_fwd_kernel": (forward, "attention", "forward"),
        "_attention_bwd_dq_kernel": (backward, "attention_dq", "backward"),
        "_attention_bwd_dkdv_kernel": (backward, "attention_dkdv", "backward"),
    }
    for kernel, (counts, op, pass_name) in of_kernels.items():
        with mock.patch.object(launch, "capability", lambda device: CHIP.capability):
            row = launch.lookup(op, qkv.device, 2, D)
        needed = PRODUCTS[kernel] * T * T * D // 2
        limit = 1 + max(row.block_m, row.block_n) / T
        name = f"1×{T}×1×{D}, {kernel}"
        yield Traffic("attention", pass_name, name, counts.products[kernel], 0, needed, limit, "products, not bytes")


VOCABULARY = 50257


def cross_entropy(n_rows: int = 3) -> Iterator[Traffic]:
    """The loss and its gradient apart, and together as the tied head makes them, over the logits of a chunk."""
    from kernels import cross_entropy as kernels

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n_rows, 50304, generator=generator).bfloat16()
    targets = torch.randint(0, VOCABULARY, (n_rows,), generator=generator)
    counts = _both(lambda x: kernels.cross_entropy(x[:, :VOCABULARY], targets), logits)
    costs = [cost(n_rows, VOCABULARY, 2) for cost in (kernels.forward_cost, kernels.backward_cost)]
    yield from _rows("cross_entropy", f"{n_rows}×{VOCABULARY}", counts, costs, (1.01, 1.01))

    hidden = torch.randn(n_rows, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, 16, generator=generator).bfloat16().requires_grad_()
    counted = count(lambda: kernels.linear_cross_entropy(hidden, weight, targets))
    # Compulsory is one read and one write; the second read follows the first, and L2 has the row still.
    compulsory = 2 * n_rows * VOCABULARY * 2
    read, written = (sum(of.values()) for of in (counted.read, counted.written))
    yield Traffic("linear_cross_entropy", "both", f"{n_rows}×{VOCABULARY}", read, written, compulsory, 1.51)


def working_set() -> str:
    """Whether the rows that are read twice are still in L2 at the second time."""
    n_bytes = CHIP.n_sms * VOCABULARY * 2
    return (
        f"linear_cross_entropy reads a row again right after the first time: {CHIP.n_sms} rows of {VOCABULARY} logits "
        f"in bf16 are {n_bytes / MIB:.1f} MiB, and the {CHIP.name}'s L2 has {CHIP.l2_bytes / MIB:.0f}: "
        f"room for {CHIP.l2_bytes / n_bytes:.1f} programs a multiprocessor"
    )


def embedding() -> Iterator[Traffic]:
    """Forward; the backward pass is torch's."""
    from kernels import embedding as kernels

    B, T, C = 16, 5, 768
    generator = torch.Generator().manual_seed(4)
    idx = torch.randint(0, 1000, (B, T), generator=generator)
    weights = [torch.randn(n, C, generator=generator) for n in (1000, T)]
    counted = count(lambda: kernels.embedding(idx, *weights))
    read, written = (sum(of.values()) for of in (counted.read, counted.written))
    compulsory = kernels.forward_cost(B, T, C, 4).bytes
    yield Traffic("embedding", "forward", f"{B}×{T}×{C}", read, written, compulsory, 1.07)


def traffic() -> list[Traffic]:
    """Count everything, in a process that interprets."""
    interpreter.choose("cpu")
    return [row for of_an_op in (gelu, layer_norm, embedding, attention, cross_entropy) for row in of_an_op()]


def violations(found: Iterable[Traffic]) -> list[str]:
    """What asks for more than it may: a line each."""
    return [
        f"{r.op} {r.pass_name} at {r.shape} asks for {r.ratio:.4f} of what is compulsory; {r.limit} is allowed"
        for r in found
        if not r.ratio <= r.limit
    ]


def picture(found: list[Traffic], path) -> None:
    """Asked over compulsory, and what is allowed, of what is limited."""
    limited = [r for r in found if math.isfinite(r.limit)]
    canvas, (ax,) = pictures.figure(10, 1.4 + 0.36 * len(limited))
    names = [f"{r.op} {r.pass_name}, {r.shape.replace('_kernel', '')}" for r in limited]
    places = range(len(limited))
    ax.barh(places, [r.limit - 1 for r in limited], left=1.0, height=0.5, color="#e2e8f0", label="allowed")
    style = {"color": pictures.OUR_COLOUR, "markersize": 5, "clip_on": False}
    ax.plot([r.ratio for r in limited], places, "o", label="asked for", **style)
    for place, r in zip(places, limited, strict=True):
        ax.text(max(r.ratio, r.limit) + 0.008, place, f"{r.ratio:.4f}", va="center", fontsize=8)
    ax.set_yticks(places, names, fontsize=8)
    ax.axvline(1.0, color="grey", linewidth=0.8)
    title = "what is asked for, over the compulsory bytes (attention: products, over those of the causal half)"
    ax.set_title(title, fontsize=10)
    ax.margins(x=0.1)
    pictures.top_first(ax)
    pictures.legend(canvas, ax)
    pictures.save(canvas, path)


def main(save: bool = False) -> int:
    """Print all of it; return 1 where something asks for more than it may."""
    found = traffic()
    header = ["op", "pass", "shape", "bytes read", "written", "compulsory", "asked/compulsory", "allowed", "how"]
    rows = [(*r[:6], f"{r.ratio:.4f}", f"{r.limit:.3f}" if math.isfinite(r.limit) else "–", r.how) for r in found]
    print(table(header, rows))
    print(working_set())
    lines = violations(found)
    print("\n".join(lines or ["nothing asks for more than it may"]))
    if save:
        picture(found, PREDICTED / "traffic.png")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
