"""Timing on a GPU: the check, then the time, all variants in turns.

Events on the stream bracket each call. Before each the device is held busy, for twice the time that the host needs to
enqueue the call, so that what is timed is the GPU alone; a row notes in how many rounds the host was late all the same.
Inputs rotate through copies that together exceed the L2 cache, so that none is warm. A round times every variant once,
in turn, so that a drift of the clock meets all of them. The device, and with it the clock, is a parameter: tests pass
one that counts.
"""

import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from bench.results import OURS, Row, commit
from kernels import accuracy
from kernels.accuracy import is_float
from kernels.cost import Cost
from kernels.ops import FORWARD_ONLY
from model.cuda_graph import CudaGraphs, GraphedCall

ROUNDS = (10, 100)
"""least and most rounds of a measurement"""
SECONDS_PER_CASE = 1.5
"""that the rounds of one pass take together, roughly"""
WARM_UP = 3
HOLD_MS = 1.0
"""that the device is held before a call at least"""
HOLD_FACTOR = 2
"""times the longest host time of the warm-up: the host shares its cores, and its times vary"""


class Device(Protocol):
    """What the harness needs of a GPU."""

    torch_device: torch.device
    gpu: str
    driver: str
    l2_bytes: int

    def hold(self, milliseconds: float) -> None:
        """Keep the device busy for at least so long; the host does not wait."""

    def host_milliseconds(self) -> float:
        """The host's clock."""

    def mark(self) -> Any:
        """Record the moment at which the device gets here."""

    def reached(self, mark: Any) -> bool:
        """Whether the device has got to a mark by now; does not wait."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the second."""

    def peak_bytes(self) -> int:
        """Most bytes of tensors alive since the last call, beyond those alive then."""

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """Record what a call launches, as a CUDA graph, and return what launches it again."""


class CudaDevice:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.gpu, self.l2_bytes = properties.name, properties.L2_cache_size
        self.driver, self._allocated = "", 0
        if shutil.which("nvidia-smi"):  # a container may lack it
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            self.driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]

    def hold(self, milliseconds: float) -> None:
        torch.cuda._sleep(int(3_000_000 * milliseconds))  # cycles; no clock is much above 3 GHz

    def host_milliseconds(self) -> float:
        return 1e3 * time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated() - self._allocated
        torch.cuda.reset_peak_memory_stats()
        self._allocated = torch.cuda.memory_allocated()
        return peak

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        graphed = GraphedCall(call, CudaGraphs(self.torch_device))
        while not graphed.captured:
            graphed()
        return graphed


class Shape(NamedTuple):
    """A size at which an op is timed."""

    name: str
    """in rows and pictures: 65536×768"""
    sizes: dict[str, int]
    """what `Benchmark.inputs` takes"""
    small: dict[str, int]
    """sizes for the check: the same columns, T and head_dim, fewer rows"""


class Benchmark(NamedTuple):
    """One op: only what differs between ops."""

    op: str
    shapes: tuple[Shape, ...]
    inputs: Callable[..., dict[str, torch.Tensor | float]]
    """(dtype, device, **sizes) -> the arguments of the op by name"""
    reference: Callable
    kernel: Callable
    """ours"""
    baselines: Callable[[], Mapping[str, Callable]]
    """the others by name, with the op's arguments"""
    costs: Callable[..., tuple[Cost, Cost]]
    """(itemsize, **sizes) -> forward, backward"""
    n_summed: Callable[..., dict[str, int]] = lambda **sizes: {}
    """(**sizes) -> rows summed into each element of a gradient, as kernels.accuracy.compare_op takes it"""
    ceiling: str = "copy"
    """what the percentages are of: a copy of the same bytes, a matmul of the same dtype, or the name of `bare`"""
    bare: Callable | None = None
    """with the op's arguments: less than the op, and of its work what nobody can do without"""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    @property
    def has_gradient(self) -> bool:
        return self.op not in FORWARD_ONLY


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    """Gaussian numbers that depend on the arguments alone."""
    generator = torch.Generator(device).manual_seed(1000 * seed + sum(shape))
    return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)


def measure(
    benchmark: Benchmark, shape: Shape, dtype: torch.dtype, device: Device, seconds: float = SECONDS_PER_CASE
) -> list[Row]:
    """Check and time every variant of an op at one shape, forward, backward and both.

    Returns:
        A row per pass and variant, the ceiling among them. A variant that is wrong or fails has no times, and a note
        that says why.
    """
    torch.compiler.reset()  # a function that was compiled for many shapes would silently fall back to eager
    variants, notes = {OURS: benchmark.kernel, **benchmark.baselines()}, {}
    for name, variant in variants.items():
        if note := reason_to_skip(benchmark, variant, shape, dtype, device):
            notes[name] = note
    forward, backward = benchmark.costs(itemsize=dtype.itemsize, **shape.sizes)
    costs = {"forward": forward}
    if benchmark.has_gradient:
        costs |= {"backward": backward, "both": forward + backward}
    copies = Copies(benchmark, shape, dtype, device)
    rows = []
    for pass_name, cost in costs.items():
        if benchmark.bare:
            ceiling, most = copies.caller(benchmark.bare, pass_name), cost
        else:
            ceiling, most = _ceiling(benchmark.ceiling, cost, dtype, device)
        calls = {name: copies.caller(variant, pass_name) for name, variant in variants.items() if name not in notes}
        times, said = time_in_turns(device, {benchmark.ceiling: ceiling} | calls, seconds)
        for name in [benchmark.ceiling, *variants]:
            work = most if name == benchmark.ceiling else cost
            row = Row(benchmark.op, pass_name, name, shape.name, str(dtype).partition(".")[2], **asdict(work))
            if name in times:
                row = row.with_(**{f"p{percent}": percentile(times[name], percent) for percent in (20, 50, 80)})
            if name in times and benchmark.ceiling in times:
                share = work.flops / most.flops if benchmark.ceiling == "matmul" else work.bytes / most.bytes
                of_ceiling, of_variant = (percentile(times[who], 50) for who in (benchmark.ceiling, name))
                row = row.with_(percent=100 * share * of_ceiling / of_variant)
            rows.append(row.with_(note=notes.get(name) or said.get(name, ""), **provenance(device)))
    return rows


def reason_to_skip(benchmark: Benchmark, variant: Callable, shape: Shape, dtype: torch.dtype, device: Device) -> str:
    """Why a variant is not timed, in a few words; an empty string where it is right."""
    inputs = benchmark.inputs(dtype=dtype, device=device.torch_device, **shape.small)
    with torch.no_grad():
        out = benchmark.reference(*inputs.values())
    outs = accuracy.as_list(out) if benchmark.has_gradient else []
    gradients = [normal(*o.shape, dtype=dtype, device=device.torch_device, seed=9 + i) for i, o in enumerate(outs)]
    try:
        n_summed = benchmark.n_summed(**shape.small)
        comparisons = accuracy.compare_op(variant, benchmark.reference, inputs, gradients, n_summed)
    except Exception as error:
        return in_a_line("failed", error)
    off = [f"{c.name} {c.error:.1e} > {c.tolerance:.1e}" for c in comparisons if not c.ok]
    return f"wrong: {', '.join(off)}" if off else ""


def in_a_line(what: str, error: Exception) -> str:
    """What was raised, for a row's note."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


class Copies:
    """Inputs and incoming gradients of an op, in as many copies as exceed the L2 cache together."""

    def __init__(self, benchmark: Benchmark, shape: Shape, dtype: torch.dtype, device: Device):
        self.device = device

        def make() -> list:
            inputs = benchmark.inputs(dtype=dtype, device=device.torch_device, **shape.sizes).values()
            return [v.requires_grad_(benchmark.has_gradient) if is_float(v) else v for v in inputs]

        first = make()
        n_bytes = sum(v.numel() * v.element_size() for v in first if isinstance(v, torch.Tensor))
        self.inputs = [first, *(make() for _ in range(min(-(-2 * device.l2_bytes // n_bytes), 64)))]
        self.gradients: list[torch.Tensor] = []

    def caller(self, variant: Callable, pass_name: str) -> Callable[[int], tuple[Any, Any]]:
        """A function that runs a variant on the copy of round i and returns the marks around what is timed."""

        def call(i: int) -> tuple[Any, Any]:
            inputs = self.inputs[i % len(self.inputs)]
            leaves = [v for v in inputs if is_float(v)]
            start = self.device.mark()
            out = variant(*inputs)
            if pass_name != "forward":
                outs = accuracy.as_list(out)
                gradients = self._gradients(outs)
                if pass_name == "backward":
                    start = self.device.mark()
                torch.autograd.grad(outs, leaves, gradients)
            return start, self.device.mark()

        return call

    def _gradients(self, outs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Made once, in the warm-up."""
        if [(g.shape, g.dtype) for g in self.gradients] != [(o.shape, o.dtype) for o in outs]:
            self.gradients = [torch.ones_like(o, memory_format=torch.contiguous_format) for o in outs]
        return self.gradients


def _ceiling(kind: str, cost: Cost, dtype: torch.dtype, device: Device) -> tuple[Callable, Cost]:
    """What a variant can hope for at most, as a call like its own, and the work that it does."""
    make: dict[str, Any] = {"dtype": dtype, "device": device.torch_device}
    if kind == "copy":
        n_elements = max(cost.bytes // 2 // dtype.itemsize, 1)
        buffers = [
            torch.ones(n_elements, **make) for _ in range(2 + min(2 * device.l2_bytes // max(cost.bytes, 1), 64))
        ]

        def run(i: int) -> None:
            buffers[i % len(buffers)].copy_(buffers[(i + 1) % len(buffers)])

        work = Cost(2 * n_elements * dtype.itemsize, 0)
    else:
        size = 8192 if device.torch_device.type == "cuda" else 16
        a, b = (normal(size, size, seed=seed, **make) for seed in (1, 2))
        product = torch.empty_like(a)

        def run(i: int) -> None:
            torch.mm(a, b, out=product)

        work = Cost(3 * size * size * dtype.itemsize, 2 * size**3)

    def call(i: int) -> tuple[Any, Any]:
        start = device.mark()
        run(i)
        return start, device.mark()

    return call, work


def time_in_turns(
    device: Device, calls: Mapping[str, Callable[[int], tuple[Any, Any]]], seconds: float, hold: bool = True
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time calls round by round.

    Args:
        device: whose clock it is.
        calls: by name; each takes the number of the round and returns the marks around what is timed.
        seconds: that all rounds take together, roughly, within the bounds of ROUNDS.
        hold: keep the device busy until the host has enqueued a call; False to time the host as well.

    Returns:
        Milliseconds of every round by name, without calls that failed; and notes by name: what a call raised, or in how
        many rounds the device may have waited for the host.
    """
    notes: dict[str, str] = {}
    hold_ms = dict.fromkeys(calls, HOLD_MS)
    host_ms: dict[str, list[float]] = {name: [] for name in calls}
    late = dict.fromkeys(calls, 0)

    def time_once(name: str, i: int) -> list[float]:
        """One time, or none from then on when the call has failed."""
        if name in notes:
            return []
        try:
            if hold:
                device.hold(hold_ms[name])
            began = device.host_milliseconds()
            start, end = calls[name](i)
            late[name] += device.reached(start)
            host_ms[name].append(device.host_milliseconds() - began)
            return [device.milliseconds(start, end)]
        except Exception as error:
            notes[name] = in_a_line("failed", error)
            gc.collect()  # an error holds the tensors of its frames
            return []

    warm = {name: [t for i in range(WARM_UP) for t in time_once(name, i)] for name in calls}
    for name in warm:
        # The first call compiles.
        hold_ms[name] = max(HOLD_MS, HOLD_FACTOR * max(host_ms[name][1:], default=0.0))
        late[name] = 0
    round_ms = sum(hold * hold_ms[name] + times[-1] for name, times in warm.items() if times)
    n_rounds = min(max(int(1e3 * seconds / max(round_ms, 1e-3)), ROUNDS[0]), ROUNDS[1])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(n_rounds):
        for name in calls:
            times[name] += time_once(name, i)
    times = {name: measured for name, measured in times.items() if name not in notes}
    if hold:
        notes |= {name: f"host late in {late[name]} of {n_rounds} rounds" for name in times if late[name]}
    return times, notes


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values."""
    return float(np.percentile(list(values), percent))


def provenance(device: Device) -> dict[str, Any]:
    """Where a row comes from."""
    triton = version("triton") if find_spec("triton") else ""
    of_device = {"gpu": device.gpu, "driver": device.driver}
    return of_device | {"torch": torch.__version__, "triton": triton, "commit": commit()}


def cases(benchmarks: Iterable[Benchmark]) -> Iterator[tuple[Benchmark, Shape, torch.dtype]]:
    """What there is to time, bf16 first and the largest shapes of every op before the others."""
    benchmarks = list(benchmarks)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for position in range(max(len(b.shapes) for b in benchmarks)):
            for benchmark in benchmarks:
                if dtype in benchmark.dtypes and position < len(benchmark.shapes):
                    yield benchmark, benchmark.shapes[position], dtype
