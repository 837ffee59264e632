"""`python -m bench roofline`: the time that bytes, FLOPs and launches allow, op by op and for the whole step.

A launch takes the longer of moving its bytes at the memory's peak and of multiplying at the tensor cores' peak, and
LAUNCH_SECONDS (bench/chips.py): a bound from below, which no kernel reaches. What a GPU has measured stands beside it.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from bench import capture, pictures, step
from bench.chips import CHIPS, LAUNCH_SECONDS, Chip
from bench.harness import Benchmark, Shape
from bench.results import OURS, PREDICTED, RESULTS, Row, measured, write
from bench.tables import put_table, table
from model.gpt import PRESETS

NOTES = RESULTS / "NOTES.md"
ROOFLINE_CHIPS = ("A100", "H100", "H200")

PARTS = (
    ("matmul", r"aten::(mm|addmm|bmm)$"),
    ("loss", r"cross_entropy|nll_loss|log_softmax|_mean_kernel"),
    ("attention", r"attention|softmax|masked_fill|triu"),
    ("norm", r"layer_norm"),
    ("GELU", r"gelu|tanh|pow"),
    ("optimizer", r"_foreach|_fused|adamw|clip"),
    ("embedding", r"embedding"),
    ("bias gradients", r"aten::sum"),
    ("casts and copies", r"copy|clone|cat|zeros|ones|fill"),
    ("other", r""),
)
"""what a kernel belongs to, by its name; the first that fits"""


PRODUCTS = {"_attention_fwd_kernel": 2, "_attention_bwd_dq_kernel": 3, "_attention_bwd_dkdv_kernel": 4}
"""matrix products that each kernel makes of a tile of scores"""


def launch_flops(noted: capture.Launch) -> int:
    """FLOPs that a launch executes where no tile is computed in vain: the causal half; 0 for other kernels."""
    if noted.name not in PRODUCTS:
        return 0
    B, H, T, D = noted.args["q_ptr"].shape
    return PRODUCTS[noted.name] * B * H * T * T * D


def part_of(name: str) -> str:
    """Which of PARTS an operation or a kernel belongs to."""
    return next(part for part, pattern in PARTS if re.search(pattern, name))


def seconds(event: capture.Event, chip: Chip, dtype: torch.dtype) -> float:
    """The least that an event takes on a chip."""
    flops = launch_flops(event.launch) if event.launch else event.flops
    peak = chip.peak(str(dtype).partition(".")[2])
    return max(event.bytes / chip.bandwidth, flops / peak) + event.launches * LAUNCH_SECONDS


class Step(NamedTuple):
    """A training step, predicted."""

    preset: str
    backend: str
    chip: str
    parts: dict[str, float]
    """seconds, in the order of PARTS"""
    launches: int
    bytes: int
    peak_bytes: int
    """most that is alive"""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def predict_step(
    preset: str,
    backend: str,
    tracing: capture.Trace,
    chips: Iterable[str] = ROOFLINE_CHIPS,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Step]:
    """Predict a step that was traced, on each chip."""
    steps = []
    for name in chips:
        parts = Counter({part: 0.0 for part, _ in PARTS})
        for event in tracing.events:
            parts[part_of(event.name)] += seconds(event, CHIPS[name], dtype)
        launches, n_bytes = (sum(getattr(event, what) for event in tracing.events) for what in ("launches", "bytes"))
        steps.append(Step(preset, backend, name, dict(parts), launches, n_bytes, tracing.peak_bytes))
    return steps


class Op(NamedTuple):
    """One op, predicted on every chip."""

    op: str
    pass_name: str
    shape: str
    bytes: int
    flops: int
    launches: int
    milliseconds: dict[str, float]


def predict_op(benchmark: Benchmark, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[Op]:
    """Bytes and FLOPs by the op's formula, launches as traced, forward and backward."""
    with capture.trace() as tracing:
        inputs = list(benchmark.inputs(dtype=dtype, device=torch.device("cpu"), **shape.sizes).values())
        inputs = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]
        tracing.restart()
        out = benchmark.kernel(*inputs)
        n_forward = sum(event.launches for event in tracing.events)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        gradients = [torch.empty_like(out) for out in outs]
        leaves = [v for v in inputs if isinstance(v, torch.Tensor) and v.requires_grad]
        torch.autograd.grad(outs, leaves, gradients)
        n_backward = sum(event.launches for event in tracing.events) - n_forward
    ops = []
    costs = benchmark.costs(itemsize=dtype.itemsize, **shape.sizes)
    for pass_name, cost, n_launches in zip(("forward", "backward"), costs, (n_forward, n_backward), strict=True):
        multiplies = benchmark.ceiling != "copy"
        times = {}
        for name in ROOFLINE_CHIPS:
            peak = CHIPS[name].peak(str(dtype).partition(".")[2] if multiplies else "float32")
            bound = max(cost.bytes / CHIPS[name].bandwidth, cost.flops / peak) + n_launches * LAUNCH_SECONDS
            times[name] = 1e3 * bound
        ops.append(Op(benchmark.op, pass_name, shape.name, cost.bytes, cost.flops, n_launches, times))
    return ops


def candidates(steps: Iterable[Step], traced: capture.Trace, chip: str = "H100") -> list[tuple]:
    """What each way of making the step of d12 faster is worth, largest first.

    Args:
        steps: the predicted steps of d12 on that chip, by `launches.backends`.
        traced: the step with our kernels.
        chip: a name in CHIPS.

    Returns:
        (name, milliseconds in PyTorch without it, milliseconds now, milliseconds that are left to gain at most).
    """
    of = {s.backend: s for s in steps if (s.preset, s.chip) == ("d12", chip)}
    eager, best, ours = (of[name] for name in ("eager", "sdpa + F.gelu", "triton"))

    def ms(*patterns: str) -> float:
        """Of our step: events whose names have any of these in them."""
        events = [event for event in traced.events if any(pattern in event.name for pattern in patterns)]
        return 1e3 * sum(seconds(event, CHIPS[chip], torch.bfloat16) for event in events)

    def parts(s: Step, *names: str) -> float:
        return 1e3 * sum(s.parts[name] for name in names)

    products = parts(eager, "matmul") - parts(best, "matmul")
    bias, clip = parts(ours, "bias gradients"), ms("_foreach_mul_", "_foreach_norm")
    casts = parts(ours, "casts and copies")
    # FlashAttention's backward makes five products of a tile, ours, which adds nothing up atomically, seven.
    attention = parts(ours, "attention"), max(parts(ours, "attention") - parts(best, "attention"), 0.0)
    launches = (1e3 * LAUNCH_SECONDS * s.launches for s in (best, ours))
    rows = [
        ("(a) casts, and additions in a pass of their own", parts(best, "casts and copies", "other"), casts, casts),
        ("(b) attention by tiles", parts(eager, "attention") + products, *attention),
        ("(c) bias gradients in a pass that reads dy already", parts(best, "bias gradients"), bias, bias),
        ("(d) the head without the logits", parts(best, "loss"), parts(ours, "loss"), 0.0),
        ("(e) launches: CUDA graphs or torch.compile", *launches, 1e3 * LAUNCH_SECONDS * ours.launches),
        (
            "(f) GELU in the epilogue of the matmul before it",
            parts(best, "GELU"),
            parts(ours, "GELU"),
            ms("_gelu_fwd") / 2,
        ),
        ("(g) clip, AdamW and the bf16 copy in one pass", parts(best, "optimizer"), parts(ours, "optimizer"), clip),
    ]
    return sorted(rows, key=lambda row: row[1] - row[2] + row[3], reverse=True)


class Prediction(NamedTuple):
    """Everything that is predicted."""

    ops: list[Op]
    """each at its first shape"""
    steps: list[Step]
    """of every preset and backend"""
    candidates: list[tuple]


def predict() -> Prediction:
    """Trace every op, and the step of every preset and backend."""
    from bench import launches
    from bench.ops import BENCHMARKS

    ops = [op for benchmark in BENCHMARKS for op in predict_op(benchmark, benchmark.shapes[0])]
    steps, of_d12 = [], {}
    for preset in launches.MODELS:
        for name, table_of_ops in launches.backends().items():
            tracing = step.trace_step(PRESETS[preset], table_of_ops)
            steps += predict_step(preset, name, tracing)
            of_d12.setdefault(name, tracing)
    return Prediction(ops, steps, candidates(steps, of_d12["triton"]))


BOUND = "roofline"
"""the variant that stands for the bound, in rows"""


def rows_of(ops: Iterable[Op], steps: Iterable[Step], dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Predictions as rows; gpu is the chip's name, and the times are bounds."""
    dtype_name = str(dtype).partition(".")[2]
    rows = [
        Row(op.op, op.pass_name, BOUND, op.shape, dtype_name, p50=ms, bytes=op.bytes, flops=op.flops, gpu=chip)
        for op in ops
        for chip, ms in op.milliseconds.items()
    ]
    for s in steps:
        of_step = Row("step", "both", s.backend, f"{s.preset} 64×1024", dtype_name, bytes=s.bytes, gpu=s.chip)
        rows.append(of_step.with_(p50=1e3 * s.seconds))
        rows += [of_step.with_(op="step part", pass_name=k, p50=1e3 * v, bytes=0) for k, v in s.parts.items()]
    return [row.with_(note="predicted") for row in rows]


def measured_beside(ops: Iterable[Op], results: Path = RESULTS) -> list[tuple]:
    """(op, pass_name, shape, GPU, predicted ms, measured ms, times the bound) of what a known chip has measured."""
    beside = []
    chips = {CHIPS[name].gpu: name for name in ROOFLINE_CHIPS}
    timed = {
        (r.op, r.pass_name, r.shape, r.gpu): r for r in measured(results) if r.variant == OURS and r.dtype == "bfloat16"
    }
    for op in ops:
        for gpu, chip in chips.items():
            row = timed.get((op.op, op.pass_name, op.shape, gpu))
            if row and row.p50 is not None:
                bound = op.milliseconds[chip]
                beside.append((op.op, op.pass_name, op.shape, gpu, bound, row.p50, row.p50 / bound))
    return sorted(beside, key=lambda line: line[5] - line[4], reverse=True)


def whole_steps(steps: Iterable[Step]) -> list[Op]:
    """Our steps as if each was an op."""
    of: dict[str, Op] = {}
    for s in steps:
        if s.backend == OURS:
            op = Op("step", "both", f"{s.preset} 64×1024", s.bytes, 0, s.launches, {})
            of.setdefault(s.preset, op).milliseconds[s.chip] = 1e3 * s.seconds
    return list(of.values())


def picture(ops: list[Op], steps: list[Step], path: Path) -> None:
    """The bound of every op, and of the step of d12 by part."""
    canvas, axes = pictures.figure(13, 7.5, 2)
    names = [f"{op.op} {op.pass_name}, {op.shape}" for op in ops]
    pictures.grouped_bars(
        axes[0], names, {chip: [op.milliseconds[chip] for op in ops] for chip in ROOFLINE_CHIPS}, "{:.2f}"
    )
    axes[0].set_xscale("log")
    axes[0].set_xlabel("milliseconds")
    axes[0].set_title("bound of every op in bf16 (predicted)", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    pictures.top_first(axes[0])
    shown = sorted((s for s in steps if s.preset == "d12"), key=lambda s: ROOFLINE_CHIPS.index(s.chip))
    labels = [f"{s.chip}, {s.backend}" for s in shown]
    pictures.stacked_bars(
        axes[1], labels, {part: [1e3 * s.parts[part] for s in shown] for part, _ in PARTS}, "{:,.0f} ms"
    )
    axes[1].set_xlabel("milliseconds")
    axes[1].set_title("bound of a step of d12 at 64×1024 in bf16 (predicted)", fontsize=10)
    axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    pictures.top_first(axes[1])
    pictures.save(canvas, path)


def main(save: bool = False) -> int:
    """Print predictions, and what was measured beside them."""
    ops, steps, ranked = predict()
    print("bounds in milliseconds: each op at its first shape in bf16")
    header = ["op", "pass", "shape", "GB", "GFLOP", "launches", *ROOFLINE_CHIPS]
    print(
        table(
            header,
            [(*op[:3], op.bytes / 1e9, op.flops / 1e9, op.launches, *op.milliseconds.values()) for op in ops],
        )
    )
    print("\nbounds of a training step at 64×1024 in bf16")
    by_step = {}
    for s in steps:
        by_step.setdefault((s.preset, s.backend), []).append(s)
    print(
        table(
            ["preset", "backend", "launches", "GB", "most alive, GB", *(f"{chip}, ms" for chip in ROOFLINE_CHIPS)],
            [
                (*key, of[0].launches, of[0].bytes / 1e9, of[0].peak_bytes / 1e9, *(1e3 * s.seconds for s in of))
                for key, of in by_step.items()
            ],
        )
    )
    print("\nof it on an H100, d12, by part: milliseconds, and the share of the step")
    shown = [s for s in steps if (s.preset, s.chip) == ("d12", "H100")]
    print(
        table(
            ["part", *(s.backend for s in shown)],
            [(p, *(f"{1e3 * s.parts[p]:.2f} ({100 * s.parts[p] / s.seconds:.0f}%)" for s in shown)) for p, _ in PARTS],
        )
    )
    print("\nwhat each way to a faster step of d12 is worth on an H100, largest first: milliseconds")
    header = ["candidate", "plain PyTorch", "now", "left to gain at most"]
    print(table(header, ranked))
    beside = measured_beside([*ops, *whole_steps(steps)])
    if beside:
        print("\nmeasured beside predicted, by what is lost")
        print(table(["op", "pass", "shape", "GPU", "bound, ms", "measured, ms", "times the bound"], beside))
    else:
        print("\nnot yet measured on a GPU")
    if save:
        write(PREDICTED / "roofline.csv", rows_of(ops, steps))
        picture(ops, steps, PREDICTED / "roofline.png")
        put_table(table(header, ranked, markdown=True), NOTES)
    return 0
