"""Registers, spills, shared memory, access widths and matrix instructions of every kernel, from machine code.

Kernels are compiled ahead of time, with the arguments that the launchers give them in a training step at 64×1024 in
bf16, and in a few awkward calls. This needs a process in which Triton compiles: `python -m tests.budgets.resources 90`
prints those of sm_90 as JSON, for the tests, whose process may interpret.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from bench import machine_code
from bench.chips import CHIPS, Chip, occupancy
from bench.harness import Benchmark
from bench.machine_code import MachineCode
from bench.ops import BENCHMARKS
from bench.tables import table
from kernels import launch
from kernels.accuracy import as_list, is_float
from kernels.ops import Ops
from model.gpt import PRESETS
from tests.budgets import capture, step

CHIP_OF = {80: CHIPS["A100"], 89: CHIPS["RTX 4090"], 90: CHIPS["H100"], 100: CHIPS["B200"], 120: CHIPS["RTX 5090"]}
BEST_MMA = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}


class Resources(NamedTuple):
    """A kernel, compiled for one call."""

    call: str
    """a preset, whose training step it is of, or a name in `awkward_calls`"""
    kernel: str
    capability: int
    code: MachineCode
    tf32: bool
    """whether it multiplies in TF32"""
    rounds: bool
    """whether it sets the last 13 bits of numbers to 0, as TF32 has them"""

    @property
    def chip(self) -> Chip:
        return CHIP_OF[self.capability]

    @property
    def occupancy(self) -> float:
        return occupancy(self.chip, self.code.registers, self.code.shared, self.code.threads // 32)


def launches(preset: str, capability: int) -> list[capture.Launch]:
    """What a training step launches, with two layers: all are alike, save that the first has no addition before it.
    And what the head that returns logits launches, and kernels that only other calls of ops do."""
    config = dataclasses.replace(PRESETS[preset], n_layer=2)
    ops = capture.our_ops()
    noted = step.trace_step(config, ops, capability=capability).launches
    with capture.trace(capability) as tracing:
        logits = torch.empty(64 * 1024, config.vocab_size, dtype=torch.bfloat16, requires_grad=True)
        ops.cross_entropy(logits, torch.empty(64 * 1024, dtype=torch.int64)).backward()
    noted += tracing.launches
    for benchmark in BENCHMARKS:
        known = {call.name for call in noted}
        noted += [call for call in by_itself(benchmark, capability) if call.name not in known]
    return noted


def by_itself(benchmark: Benchmark, capability: int) -> list[capture.Launch]:
    """What an op launches in bf16 at the first shape of its benchmark, forward and backward."""
    with capture.trace(capability) as tracing:
        device, sizes = torch.device("cpu"), benchmark.shapes[0].sizes
        inputs = list(benchmark.inputs(dtype=torch.bfloat16, device=device, **sizes).values())
        leaves = [value.requires_grad_(benchmark.has_gradient) for value in inputs if is_float(value)]
        outs = as_list(benchmark.kernel(*inputs))
        if benchmark.has_gradient:
            torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    return tracing.launches


def decode(
    ops: Ops, capability: int, H: int, D: int, T: int = 1024, dtype: torch.dtype = torch.bfloat16
) -> list[capture.Launch]:
    """What attention to a cache of T keys launches, for 8 sequences."""
    with capture.trace(capability) as tracing:
        k, v = (torch.empty(8, H, T, D, dtype=dtype) for _ in range(2))
        ops.decode_attention(torch.empty(8, H, D, dtype=dtype), k, v, torch.empty(8, dtype=torch.int64))
    return tracing.launches


def awkward_calls() -> dict[str, tuple[int, list[capture.Launch]]]:
    """Capability and launches of calls with real tensors, fp32, TF32, odd lengths and the widest rows, by name."""
    ops = capture.our_ops()

    def attention(capability: int, T: int, D: int, dtype: torch.dtype, precision: str = "ieee") -> list[capture.Launch]:
        torch.backends.cuda.matmul.fp32_precision = precision
        with capture.trace(capability) as tracing:
            ops.attention(torch.empty(1, T, 3 * 2 * D, dtype=dtype, requires_grad=True), 2).sum().backward()
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        return tracing.launches

    def add_layer_norm(width: int) -> list[capture.Launch]:
        with capture.trace(90) as tracing:
            shapes = [(8, width)] * 2 + [(width,)] * 3
            tensors = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
            total, normed = ops.add_layer_norm(*tensors)
            (total + normed).sum().backward()
        return tracing.launches

    def real_gelu() -> list[capture.Launch]:
        calls: list[launch.Call] = []
        with launch.DryRun(80, calls.append):
            ops.gelu(torch.empty(64, 3072, dtype=torch.bfloat16))
        return [capture.Launch(*call) for call in calls]

    return {
        "real": (80, real_gelu()),
        "tf32": (90, attention(90, 64, 16, torch.float32, "tf32")),
        "fp32": (90, attention(90, 64, 16, torch.float32)[:1]),
        "bf16": (90, attention(90, 64, 16, torch.bfloat16, "tf32")[:1]),
        "odd": (90, attention(90, 999, 33, torch.bfloat16)),
        "wide": (120, attention(120, 999, 80, torch.float32)[:2]),
        "widest": (90, add_layer_norm(65535)),
        "decode fp32": (80, decode(ops, 80, 3, 128, dtype=torch.float32)),
        "decode odd": (90, decode(ops, 90, 3, 33, T=999)),
        "decode long": (100, decode(ops, 100, 1, 16, T=16384, dtype=torch.float16)),
    }


def compile_all(capabilities: Iterable[int] = CHIP_OF) -> list[Resources]:
    """Compile every kernel of a step of PRESET for these chips, each variant once, and the awkward calls."""
    calls = [(step.PRESET, capability, launches(step.PRESET, capability)) for capability in capabilities]
    calls += [(name, *call) for name, call in awkward_calls().items()]
    variants: dict[tuple, tuple] = {}
    for name, capability, noted in calls:
        for call in noted:
            specialised = machine_code.specialise(call, capability)
            variants.setdefault((name, *specialised.key), (name, call.name, capability, specialised))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda variant: _inspect(*variant), variants.values())
    return sorted(found, key=lambda r: (r.call, r.capability, r.kernel))


def _inspect(call: str, kernel: str, capability: int, specialised: machine_code.Specialised) -> Resources:
    ptx = specialised.compile().asm["ptx"]
    tf32, rounds = ".tf32.tf32" in ptx, re.search(r"and\.b32.*, -8192;", ptx) is not None
    return Resources(call, kernel, capability, machine_code.read(specialised), tf32, rounds)


def violations(found: Iterable[Resources]) -> list[str]:
    """A line for each limit that is broken."""
    lines = []
    for r in found:
        where = f"{r.kernel} ({r.call}, sm_{r.capability})"
        if r.code.spills:
            lines.append(f"{where} spills {r.code.spills} bytes per thread")
        if r.code.shared > r.chip.shared_per_block:
            lines.append(f"{where} needs {r.code.shared} bytes of shared memory; the {r.chip.name} has fewer")
        if r.code.has_dot and r.code.mma != BEST_MMA[r.capability]:
            lines.append(f"{where} multiplies by {r.code.mma or 'no matrix instruction'}, not {BEST_MMA[r.capability]}")
        if r.code.serialised:
            lines.append(f"{where}: ptxas serialises wgmma")
    return lines


def resources_table(found: Iterable[Resources]) -> str:
    """One line per kernel and chip."""
    header = [
        *("kernel", "chip", "registers", "spills", "shared", "of", "threads", "occupancy"),
        *("load bits", "store bits", "matrix"),
    ]
    rows = [
        (
            *(r.kernel, f"sm_{r.capability}", r.code.registers, r.code.spills, r.code.shared, r.chip.shared_per_block),
            *(r.code.threads, f"{100 * r.occupancy:.0f}%", r.code.load_bits, r.code.store_bits, r.code.mma),
        )
        for r in found
        if r.call == step.PRESET
    ]
    return table(header, rows)


if __name__ == "__main__":
    from kernels import interpreter

    interpreter.choose("cuda")
    print(json.dumps(compile_all(map(int, sys.argv[1:]))))
