"""A training step on fake tensors: what each backend launches, moves and keeps for the backward pass."""

import dataclasses
from collections import Counter
from typing import NamedTuple

import torch

from bench.results import OURS
from bench.tables import table
from bench.variants import BACKENDS, PARTS, part_of
from kernels.ops import Ops
from model.gpt import GPT, PRESETS, GPTConfig
from tests.budgets import capture
from training import memory, optim
from training.config import Config
from training.step import autocast_to, training_step

PRESET, BATCH_SIZE, SEQUENCE_LENGTH = "d12", 64, 1024
TITLE = f"{PRESET} at {BATCH_SIZE}×{SEQUENCE_LENGTH} under bf16 autocast"
RECOMPUTE_LEVELS = (0, 1, 2)


def backends() -> dict[str, Ops]:
    """The tables of ops that are counted, by name."""
    return {name: capture.our_ops() if name == OURS else of("cpu") for name, of in BACKENDS.items()}


def trace_step(
    config: GPTConfig,
    ops: Ops,
    capability: int = 90,
    residual_dtype: torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
) -> capture.Trace:
    """Trace a training step of a network, not the first, which makes the optimizer's state."""
    gpt = GPT(config, ops, init=False)
    gpt.residual_dtype = residual_dtype
    with capture.trace(capability) as tracing:
        capture.fake_parameters(gpt)
        optimizer = optim.build(gpt, Config(learning_rate=1e-4, weight_decay=0.1))
        for param in gpt.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()
        optimizer.zero_grad()
        x, y = (torch.empty(batch_size, SEQUENCE_LENGTH, dtype=torch.int64) for _ in range(2))
        tracing.restart()
        training_step(gpt, optimizer, [(x, y)], autocast_to(torch.bfloat16, x.device))
    return tracing


class Counted(NamedTuple):
    """A training step of one backend."""

    launches: Counter[str]
    """by name of the kernel or operation"""
    bytes_outside_matmuls: int
    peak_bytes: int
    """most that is alive at a time"""

    @property
    def by_part(self) -> dict[str, int]:
        """Launches by part of the step."""
        parts = dict.fromkeys(PARTS, 0)
        for name, launches in self.launches.items():
            parts[part_of(name)] += launches
        return parts


def count_steps() -> dict[str, Counted]:
    """Count a step of PRESET by backend."""
    counted = {}
    for name, ops in backends().items():
        tracing, launches = trace_step(PRESETS[PRESET], ops), Counter[str]()
        for event in tracing.events:
            launches[event.name] += event.launches
        outside = sum(event.bytes for event in tracing.events if not event.matmul)
        counted[name] = Counted(launches, outside, tracing.peak_bytes)
    return counted


class Saved(NamedTuple):
    """What autograd saves between forward and backward."""

    elements: int
    bytes: int
    largest: int
    """elements of the largest tensor"""


def saved(config: GPTConfig, ops: Ops, dtype: torch.dtype, tokens: tuple[int, int], recompute: int = 0) -> Saved:
    """Count saved activations with saved-tensor hooks: each storage once, without parameters and inputs. `dtype` is
    that of the matrix products, below fp32 by autocast; `tokens` is (B, T)."""
    gpt = GPT(config, ops, init=False)
    gpt.set_recompute(recompute)
    kept: dict[int, torch.UntypedStorage] = {}
    widths: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata], widths[storage._cdata] = storage, tensor.element_size()
        return tensor

    with capture.trace():
        capture.fake_parameters(gpt)
        x, y = (torch.empty(tokens, dtype=torch.int64) for _ in range(2))
        given = {tensor.untyped_storage()._cdata for tensor in (x, y, *gpt.parameters())}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                _, loss = gpt(x, y, return_logits=False)
            sizes = {key: storage.nbytes() for key, storage in kept.items() if key not in given}
            elements = [n_bytes // widths[key] for key, n_bytes in sizes.items()]
            del loss
    return Saved(sum(elements), sum(sizes.values()), max(elements))


def saved_per_layer(ops: Ops, dtype: torch.dtype = torch.bfloat16, recompute: int = 0) -> tuple[float, float]:
    """(elements, bytes) per token and layer of PRESET, in units of C. Copies of weights, which tokens share, are left
    out: what three layers save beyond two, and two sequences beyond one."""

    def count(n_layer: int, batch_size: int) -> Saved:
        config = dataclasses.replace(PRESETS[PRESET], n_layer=n_layer)
        return saved(config, ops, dtype, (batch_size, SEQUENCE_LENGTH), recompute)

    (three_two, three_one), (two_two, two_one) = ([count(n_layer, B) for B in (2, 1)] for n_layer in (3, 2))
    scale = SEQUENCE_LENGTH * PRESETS[PRESET].n_embd
    elements = three_two.elements - three_one.elements - two_two.elements + two_one.elements
    n_bytes = three_two.bytes - three_one.bytes - two_two.bytes + two_one.bytes
    return elements / scale, n_bytes / scale


def head_peak(ops: Ops) -> float:
    """Most bytes alive in forward and backward of PRESET's head, beyond its inputs and their gradients, over the bytes
    of the logits in bf16."""
    config, n_rows = PRESETS[PRESET], BATCH_SIZE * SEQUENCE_LENGTH
    with capture.trace() as tracing:
        hidden = torch.empty(n_rows, config.n_embd, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(config.vocab_size, config.n_embd, requires_grad=True)
        targets = torch.empty(n_rows, dtype=torch.int64)
        tracing.restart()
        gradients = 2 * hidden.numel() + 4 * weight.numel()
        before = tracing.live_bytes
        with torch.autocast("cpu", torch.bfloat16):
            ops.linear_cross_entropy(hidden, weight, targets).backward()
    return (tracing.peak_bytes - before - gradients) / (2 * n_rows * config.vocab_size)


def launches_table(steps: dict[str, Counted]) -> str:
    """Launches of a step by name, and their sums by part."""
    names = sorted({name for step in steps.values() for name in step.launches}, key=lambda name: (part_of(name), name))
    rows: list[tuple] = [(part_of(n), n, *(step.launches[n] for step in steps.values())) for n in names]
    rows += [(part, "in sum", *(step.by_part[part] for step in steps.values())) for part in PARTS]
    return table(["part", "kernel or operation", *steps], rows)


HEADER = (
    *("backend", "kernel launches", "GB outside matmuls", "saved elements per token and layer, in C"),
    *("head's peak, in logits", "most alive, GB"),
)


def summary(steps: dict[str, Counted], markdown: bool = False) -> str:
    """The table of README, from `count_steps`."""
    rows = []
    for name, ops in backends().items():
        step = steps[name]
        elements, _ = saved_per_layer(ops)
        outside, alive = (n_bytes / 1e9 for n_bytes in (step.bytes_outside_matmuls, step.peak_bytes))
        rows.append((name, sum(step.launches.values()), outside, elements, head_peak(ops), alive))
    return table(HEADER, rows, markdown)


BATCH_SIZES = (1, 8, 64)
GPUS = (16, 24, 80)
"""GB of memory"""


def count_memory(preset: str) -> list[float]:
    """Most GB alive in a step of a preset with our kernels, by BATCH_SIZES."""
    traces = [trace_step(PRESETS[preset], capture.our_ops(), batch_size=B) for B in BATCH_SIZES]
    return [tracing.peak_bytes / 1e9 for tracing in traces]


def memory_table(counted: dict[str, list[float]]) -> str:
    """The table of README with what `count_memory` returns by preset, and default batches."""
    ops = capture.our_ops()
    rows = []
    for preset, gigabytes in counted.items():
        config = PRESETS[preset]
        batches = (memory.batch_in_memory(config, ops, SEQUENCE_LENGTH, "bfloat16", n * 1e9) for n in GPUS)
        rows.append((preset, f"{config.num_params() / 1e6:,.0f}M", *gigabytes, *batches))
    header = ["model", "parameters", *(f"{B} × 1024" for B in BATCH_SIZES), *(f"default batch, {n} GB" for n in GPUS)]
    return table(header, rows, markdown=True)


def saved_table() -> str:
    """Saved activations by backend, level of recomputation and dtype."""
    rows = []
    for name, ops in backends().items():
        for level in RECOMPUTE_LEVELS if name == OURS else (0,):
            of_dtypes = [saved_per_layer(ops, dtype, level) for dtype in (torch.float32, torch.bfloat16)]
            rows.append((name, level, *(value for pair in of_dtypes for value in pair)))
    header = ["backend", "recompute", "fp32: elements/C", "bytes/C", "bf16: elements/C", "bytes/C"]
    return table(header, rows)
