"""The training step, as train.py makes it, in every variant that is timed, and the parts that its time goes to."""

import gc
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import baselines
from bench.harness import Device, in_a_line, percentile, provenance, time_in_turns
from bench.results import OURS, Row
from kernels.ops import EAGER, SDPA, Ops, triton_ops
from model.gpt import GPT, PRESETS, GPTConfig
from training import optim
from training.config import Config
from training.flops import flops_per_token, peak_flops
from training.step import autocast_to, training_step


def shape_name(preset: str, tokens: tuple[int, int]) -> str:
    """How rows call it: d12 64×1024."""
    return f"{preset} {tokens[0]}×{tokens[1]}"


BACKENDS: dict[str, Callable[[str], Ops]] = {
    "eager": lambda device_type: EAGER,
    "sdpa": lambda device_type: SDPA,
    "sdpa + F.gelu": lambda device_type: SDPA._replace(gelu=baselines.torch_gelu),
    OURS: triton_ops,
}
"""tables of ops by name, for what is timed and for what tests/budgets counts; from the type of the device"""


class Variant(NamedTuple):
    """One way to make the step."""

    backend: str
    """a name in BACKENDS"""
    compiled: bool = False
    graphed: bool = False


VARIANTS = {
    OURS: Variant(OURS),
    f"{OURS} + compile": Variant(OURS, compiled=True),
    f"{OURS} + CUDA graph": Variant(OURS, graphed=True),
    "eager": Variant("eager"),
    "sdpa": Variant("sdpa"),
    "sdpa + F.gelu": Variant("sdpa + F.gelu"),
    "eager + compile": Variant("eager", compiled=True),
    "sdpa + compile": Variant("sdpa", compiled=True),
}


def build(variant: Variant, config: GPTConfig, tokens: tuple[int, int], dtype: torch.dtype, device: Device) -> Callable:
    """A network of its own, ready for its next step: a function without arguments that makes one."""
    where = device.torch_device
    gpt = GPT(config, BACKENDS[variant.backend](where.type)).to(where)
    optimizer = optim.build(gpt, Config(learning_rate=1e-4, weight_decay=0.1))
    for group in optimizer.param_groups:
        group["capturable"] = variant.graphed and where.type == "cuda"
    model: Any = torch.compile(gpt, fullgraph=True) if variant.compiled else gpt
    generator = torch.Generator(where).manual_seed(1)
    x, y = (torch.randint(0, config.vocab_size, tokens, generator=generator, device=where) for _ in range(2))

    def make_step() -> torch.Tensor:
        return training_step(model, optimizer, [(x, y)], autocast_to(dtype, where))

    return device.capture(make_step) if variant.graphed else make_step


BATCH_SIZES = (64, 16)
"""that are timed where none is asked for: a large one, and the largest power of two at which every variant of d12 fits
an 80 GB card. Eager, the largest, has 150 GB alive at 64, 76 at 32 and 39 at 16 (counted, T = 1024 and bf16)."""
PASSES = 2
"""through the variants: one is alive at a time, so they cannot take turns step by step; a clock that drifts widens the
spread of a row"""


def measure(
    preset: str,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    device: Device,
    variants: Iterable[str] = tuple(VARIANTS),
    seconds: float = 20.0,
    chrome_trace: Path | None = None,
) -> list[Row]:
    """Time the variants, and where the time of each goes: build one, time it, free it, then the next; in PASSES passes.

    Args:
        preset: a name in PRESETS.
        tokens: (B, T).
        dtype: of the matrix products.
        device: whose clock it is.
        variants: names in VARIANTS; one that does not fit in memory, or fails, gets a row that says so.
        seconds: that all timed steps take together, roughly.
        chrome_trace: where a trace of the first variant goes.

    Returns:
        A row for each variant, `percent` being its MFU, and rows of the op "step part" for what it spends where.
    """
    config, dtype_name, variants = PRESETS[preset], str(dtype).partition(".")[2], list(variants)
    times: dict[str, list[float]] = {name: [] for name in variants}
    notes: dict[str, str] = {}
    parts: dict[str, dict[str, float]] = {}

    def time_variant(name: str, last: bool) -> None:
        """Everything that the variant needs lives in this frame."""
        device.peak_bytes()
        make_step = build(VARIANTS[name], config, tokens, dtype, device)

        def call(i: int) -> tuple:
            start = device.mark()
            make_step()
            return start, device.mark()

        share = seconds / PASSES / len(variants)
        timed, failures = time_in_turns(device, {name: call}, share, hold=False)  # a step's time has the host's in it
        notes[name] = failures.get(name, f"peak {device.peak_bytes() / 1e9:.1f} GB")
        times[name] = times[name] + timed[name] if name in timed else []
        if last and name in timed:
            trace = None if parts else chrome_trace
            parts[name] = where_time_goes(make_step, percentile(timed[name], 50), device, trace)

    for last in [False] * (PASSES - 1) + [True]:
        for name in variants:
            if name in notes and not times[name]:
                continue  # it failed in the pass before
            try:
                time_variant(name, last)
            except Exception as error:
                times[name], notes[name] = [], in_a_line("failed", error)
            torch.compiler.reset()  # it holds what it compiled
            gc.collect()

    flops = flops_per_token(config, tokens[1]) * tokens[0] * tokens[1]
    peak = peak_flops(device.gpu, dtype_name, 0)
    shape, rows = shape_name(preset, tokens), []
    for name in variants:
        row = Row("step", "both", name, shape, dtype_name, flops=flops, note=notes[name], **provenance(device))
        for part, milliseconds in parts.get(name, {}).items():
            rows.append(row.with_(op="step part", pass_name=part, p50=milliseconds))
        if times[name]:
            p20, p50, p80 = (percentile(times[name], percent) for percent in (20, 50, 80))
            row = row.with_(p20=p20, p50=p50, p80=p80, percent=1e5 * flops / p50 / peak if peak else None)
        rows.append(row)
    return rows


PARTS = {
    "attention": r"flash|fmha|attention|attn|masked_fill|triu|softmax_warp|aten::_softmax|\bSoftMax(For|Back)wardEpi",
    "matmul": r"aten::(mm|addmm|bmm|baddbmm)$|gemm|cutlass|nvjet|xmma|cublas|splitK|matmul|_mm_",
    "loss": r"cross_entropy|soft_?max|nll|_mean_kernel",
    "norm": r"layer_?norm|GammaBeta|rowwise_?moments",
    "GELU": r"gelu|tanh|pow",
    "optimizer": r"adam|multi_tensor|lpnorm|foreach|clip",
    "embedding": r"embedding|compute_grad_weight",
    "column sums": r"column_sums|aten::sum$|reduce_kernel.*sum",
    "copies and casts": r"copy|memcpy|memset|\bcat\b|cat_?array|clone|aten::(zeros|ones)|fill",
    "other": r"",
}
"""parts of a step by the names of torch's operations, of our kernels and of kernels as the profiler gives them; of the
patterns that fit, the first holds. "column sums" has our LayerNorm's too, of the same kernel."""


def part_of(name: str) -> str:
    """Which of PARTS a kernel or operation belongs to."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE))


def where_time_goes(
    make_step: Callable, milliseconds: float, device: Device, chrome_trace: Path | None = None
) -> dict[str, float]:
    """Milliseconds of a step by PARTS, from torch.profiler; what is left of the step's own time is idle."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.torch_device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        make_step()
        device.milliseconds(device.mark(), device.mark())
    if chrome_trace:
        profile.export_chrome_trace(str(chrome_trace))
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profile.events():
        # What is merely annotated spans kernels that are counted by themselves.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            parts[part_of(event.name)] += event.device_time_total / 1e3
    return parts | {"idle": max(milliseconds - sum(parts.values()), 0.0)}
