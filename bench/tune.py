"""`python -m bench tune OP [OP ...]`: find the fastest launch configuration of an op.

For each row of kernels/launch.py that an op launches with, candidates are compiled ahead of time. Those that spill, do
not fit shared memory, make ptxas run wgmma one by one, or do not compile are dropped. Without a GPU the rest is listed.
With one, each is checked against the reference on small inputs, then timed: all of them briefly, then the best in turns
with the present row. The winner is printed as a row for kernels/launch.py; nothing is tuned at run time. Times are
written after each group, so that the same command resumes; those of another commit are measured again.
"""

import itertools
import os
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import harness, results
from bench.chips import CHIPS, Chip, occupancy
from bench.harness import Benchmark, Device, Shape
from bench.machine_code import MachineCode, read, specialise
from bench.ops import BENCHMARKS
from bench.results import RESULTS, Row
from bench.tables import table
from common import BadInput
from kernels import launch
from kernels.accuracy import as_list, is_float
from kernels.launch import LaunchConfig

DTYPE = torch.bfloat16
Clock = Callable[[], float]
# The first round times groups of 8 in turns, for so many seconds each; the final one the present row and the best 8.
GROUP, SECONDS = 8, 0.15
FINALISTS, FINAL_SECONDS = 8, 4.0
FINAL = "final"  # begins the note of a time of the final round


class Sweep(NamedTuple):
    """Values to try, in every combination that ELEMENTS_PER_THREAD allows."""

    block_m: tuple[int, ...]
    block_n: tuple[int, ...]
    num_warps: tuple[int, ...]
    num_stages: tuple[int, ...] = (1,)
    max_registers: Mapping[int, int] = {}
    """by num_warps: a limit that is tried beside none"""
    programs: tuple[int, ...] = (1,)
    """per multiprocessor"""


class Tunable(NamedTuple):
    """Rows of kernels/launch.py by their name there, how the names of their kernels begin, and the pass to time."""

    config: str
    kernels: str
    pass_name: str
    sweep: Sweep


ELEMENTS_PER_THREAD = 8, 64
"""of a tile, least and most: eight 16-bit elements are one 128-bit access, and 64 in fp32 a quarter of the registers"""
# 255 registers per thread let an SM hold two blocks of 4 warps, or one of 8. These limits make room for one more.
ONE_MORE_BLOCK = {4: 168, 8: 128}
# Tiles of scores. tl.dot takes 16 or more; the side that a block keeps is at least wgmma's 64.
QUERIES_KEPT = Sweep((64, 128), (32, 64, 128), (4, 8), (2, 3), ONE_MORE_BLOCK)
KEYS_KEPT = Sweep((32, 64, 128), (64, 128), (4, 8), (2, 3), ONE_MORE_BLOCK)
# Whole rows. Two stages share one buffer, so that nothing overlaps within a block; with three, copies do, and between
# blocks of an SM everything does.
ROWS = Sweep((1, 2, 4, 8, 16), (0,), (4, 8, 16), (1, 2, 3), programs=(1, 2, 3))
PARTIALS = Sweep((32, 64, 128), (16, 32, 64), (4, 8))
GATHER = Sweep((1, 4, 8, 16), (128, 256, 512, 1024), (4, 8))
# Elements of a block: more bytes in flight per thread, or more blocks on an SM.
ELEMENTWISE = Sweep((1,), (512, 1024, 2048, 4096), (2, 4, 8))
# Sums of tiles that are added per step, and keys of a tile.
KEYS = Sweep((16, 32, 64), (32, 64, 128), (2, 4, 8))
LOGITS = Sweep((1,), (2048, 4096, 8192, 16384), (4, 8, 16, 32))

LAYER_NORM = (
    Tunable("layer_norm", "_layer_norm_fwd_kernel", "forward", ROWS),
    Tunable("layer_norm_backward", "_layer_norm_bwd_kernel", "backward", ROWS),
    Tunable("column_sums", "_column_sums_kernel", "backward", PARTIALS),
)
TUNABLES = {
    "attention": (
        Tunable("attention", "_attention_fwd_kernel", "forward", QUERIES_KEPT),
        Tunable("attention_dq", "_attention_bwd_dq_kernel", "backward", QUERIES_KEPT),
        Tunable("attention_dkdv", "_attention_bwd_dkdv_kernel", "backward", KEYS_KEPT),
    ),
    "layer_norm": LAYER_NORM,
    "add_layer_norm": LAYER_NORM,
    "gelu": (Tunable("gelu", "_gelu_", "both", ELEMENTWISE),),
    # The backward pass of the embedding is torch's; the head makes its gradients in its forward pass.
    "embedding": (Tunable("embedding", "_embedding_fwd_kernel", "forward", GATHER),),
    "decode_attention": (Tunable("decode_attention", "_decode_attention_", "forward", KEYS),),
    "cross_entropy": (Tunable("cross_entropy", "_cross_entropy_", "both", LOGITS),),
    "linear_cross_entropy": (Tunable("cross_entropy", "_linear_cross_entropy_kernel", "forward", LOGITS),),
}


class Case(NamedTuple):
    """An op at one shape, for one compute capability."""

    benchmark: Benchmark
    shape: Shape
    capability: int

    @property
    def chip(self) -> Chip:
        """The first chip of that capability, or of the nearest lower one."""
        return max((c for c in CHIPS.values() if c.capability <= self.capability), key=lambda chip: chip.capability)


class Candidate(NamedTuple):
    """A configuration, the largest need of its kernels if they were compiled, and why it is not timed."""

    config: LaunchConfig
    code: MachineCode | None = None
    dropped: str = ""


def parse(arguments: Namespace, default_capability: int) -> list[Case]:
    """The cases that a command line asks for. Raises BadInput for an unknown op or shape, or a wrong number."""
    capability = default_capability if arguments.capability is None else arguments.capability
    if not arguments.minutes > 0:  # NaN too
        raise BadInput(f"--minutes {arguments.minutes:g} leaves no time to measure in; give a number above 0")
    if capability < 80:
        raise BadInput(f"--capability {capability} is too low; give 80 (A100), 90 (H100), 100 (B200) or another one")
    known = {benchmark.op: benchmark for benchmark in BENCHMARKS if benchmark.op in TUNABLES}
    cases = []
    for op in known if "all" in arguments.ops else dict.fromkeys(arguments.ops):
        if op not in known:
            raise BadInput(f"OP {op!r} is none that can be tuned; choose from all, {', '.join(sorted(known))}")
        shapes = {shape.name: shape for shape in known[op].shapes}
        wanted = arguments.shape.replace("x", "×") if arguments.shape else next(iter(shapes))  # few keyboards have a ×
        if wanted not in shapes:
            raise BadInput(f"--shape {arguments.shape} is none of {op}; choose from {', '.join(shapes)}")
        cases.append(Case(known[op], shapes[wanted], capability))
    return cases


def candidates(tunable: Tunable, case: Case) -> list[LaunchConfig]:
    """The present row of the table, then what is tried against it."""
    sweep, sizes = tunable.sweep, case.shape.sizes
    width = next(sizes[name] for name in ("D", "n_cols", "C") if name in sizes)
    with launch.DryRun(case.capability, lambda call: None):
        present = launch.lookup(tunable.config, torch.device("cpu"), DTYPE.itemsize, width)
    found = [present]
    for m, n, warps, stages, programs in itertools.product(*sweep[:4], sweep.programs):
        elements = m * (n or launch.next_power_of_2(width)) / (32 * warps)
        if ELEMENTS_PER_THREAD[0] <= elements <= ELEMENTS_PER_THREAD[1]:
            tried = present._replace(block_m=m, block_n=n, num_warps=warps, num_stages=stages, programs=programs)
            limits = dict.fromkeys((None, sweep.max_registers.get(warps)))
            found += [tried._replace(max_registers=limit) for limit in limits]
    return [present, *(config._replace(capability=case.capability) for config in found if config != present)]


def name(config: LaunchConfig) -> str:
    """As in the rows: attention 128×64 w8 s3 r128; p2 for two programs per SM."""
    limit = f" r{config.max_registers}" if config.max_registers else ""
    programs = f" p{config.programs}" if config.programs > 1 else ""
    return f"{config.op} {config.block_m}×{config.block_n} w{config.num_warps} s{config.num_stages}{limit}{programs}"


def source(config: LaunchConfig) -> str:
    """The row as Python text."""
    width = "ANY" if config.width == launch.ANY else config.width
    numbers = ", ".join(map(str, (config.capability, width, *config[3:8])))
    defaults = config._field_defaults
    options = [f", {name}={getattr(config, name)}" for name in defaults if getattr(config, name) != defaults[name]]
    return f'LaunchConfig("{config.op}", {numbers}{"".join(options)}),'


def reason_to_drop(code: MachineCode, present: MachineCode | None, chip: Chip) -> str:
    """Why a candidate is not worth timing; an empty string where it is."""
    if code.shared > chip.shared_per_block:
        return "does not fit shared memory"
    if code.spills > (present.spills if present else 0):
        return "spills"
    return "wgmma serialised" if code.serialised else ""


def survey(tunable: Tunable, case: Case) -> list[Candidate]:
    """Compile every candidate. The present row is the first, and never dropped for what its machine code says."""
    present, *_ = configs = candidates(tunable, case)
    inputs = list(case.benchmark.inputs(dtype=DTYPE, device=torch.device("cpu"), **case.shape.small).values())
    leaves = [v.requires_grad_(case.benchmark.has_gradient) for v in inputs if is_float(v)]
    found: dict[LaunchConfig, Candidate] = {}

    def launches(config: LaunchConfig) -> list[launch.Call]:
        calls: list[launch.Call] = []
        with launch.Trial(config), launch.DryRun(case.capability, calls.append):
            outs = as_list(case.benchmark.kernel(*inputs))
            if case.benchmark.has_gradient:
                torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])
        return [call for call in calls if call.kernel.fn.__name__.startswith(tunable.kernels)]

    def compiled(config: LaunchConfig, calls: list[launch.Call]) -> Candidate:
        try:
            codes = [read(specialise(call, case.capability)) for call in calls]
        except Exception as error:
            return Candidate(config, dropped=harness.in_a_line("does not compile", error))
        return Candidate(config, MachineCode._make(map(max, zip(*codes, strict=True))))

    def limit_is_useless(config: LaunchConfig) -> bool:
        code = found.get(config._replace(max_registers=None), Candidate(config)).code
        return code is not None and (code.spills > 0 or code.registers <= (config.max_registers or 0))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in ([c for c in configs if not c.max_registers], [c for c in configs if c.max_registers]):
            batch = [config for config in batch if config is present or not limit_is_useless(config)]
            found |= zip(batch, pool.map(compiled, batch, map(launches, batch)), strict=True)
    for config in configs[1:]:
        candidate = found.setdefault(config, Candidate(config, dropped="limit is no use"))
        if candidate.code:
            reason = reason_to_drop(candidate.code, found[present].code, case.chip)
            found[config] = candidate._replace(dropped=reason)
    return [found[config] for config in configs]


def listing(found: Sequence[Candidate], chip: Chip) -> str:
    """A table of candidates, those that were dropped last, and how many these are by reason."""
    lines = []
    for config, code, dropped in sorted(found, key=lambda candidate: candidate.dropped):
        cells: tuple = (None,) * 5
        if code:
            share = occupancy(chip, code.registers, code.shared, code.threads // 32)
            blocks = round(share * chip.threads_per_sm / code.threads)
            cells = code.registers, code.spills, code.shared, blocks, f"{100 * share:.0f}%"
        note = dropped or ("present row" if config is found[0].config else "")
        lines.append((*config[4:9], config.programs, *cells, note))
    reasons = Counter(candidate.dropped.partition(":")[0] for candidate in found if candidate.dropped)
    counts = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common()) or "none"
    header = ["block_m", "block_n", "warps", "stages", "limit", "programs"]
    header += ["registers", "spills", "shared", "blocks per SM"]
    left = f"{len(found) - reasons.total()} of {len(found)} are left within the limits of {chip.name}"
    return f"{table([*header, 'occupancy', 'dropped'], lines)}\n{left}; dropped: {counts}"


class Timing:
    """The candidates of one row on a GPU, and what is measured of them at this commit."""

    def __init__(self, tunable: Tunable, case: Case, device: Device, root: Path):
        self.tunable, self.case, self.device = tunable, case, device
        self.trials = {name(config): launch.Trial(config) for config in candidates(tunable, case)}
        self.present = next(iter(self.trials))
        self.path = results.folder(device.gpu, root) / "tune" / f"{case.benchmark.op}.csv"  # report reads one folder up
        now, keys = results.commit(), {self._row(variant).key for variant in self.trials}
        stored = results.read(self.path) if self.path.exists() and not now.endswith("+") else []
        self.rows = {row.variant: row for row in stored if row.commit == now and row.key in keys}

    def _row(self, variant: str) -> Row:
        return Row(self.case.benchmark.op, self.tunable.pass_name, variant, self.case.shape.name, "bfloat16")

    def _timed(self, call: Callable[[int], tuple[Any, Any]], variant: str, i: int) -> tuple[Any, Any]:
        with self.trials[variant]:
            return call(i)

    def measure(self, variants: Sequence[str], seconds: float, mark: str) -> None:
        """Check, time in turns those that are right, and write down all of them."""
        (benchmark, shape, _), notes = self.case, {}
        for variant in variants:
            with self.trials[variant]:
                notes[variant] = harness.reason_to_skip(benchmark, benchmark.kernel, shape, DTYPE, self.device)
        copies = harness.Copies(benchmark, shape, DTYPE, self.device)
        call = copies.caller(benchmark.kernel, self.tunable.pass_name)
        calls = {variant: partial(self._timed, call, variant) for variant in variants if not notes[variant]}
        times, said = harness.time_in_turns(self.device, calls, seconds)
        for variant in variants:
            note = f"{mark} {notes[variant] or said.get(variant, '')}".strip()
            of_time = {f"p{p}": harness.percentile(times[variant], p) for p in (20, 50, 80) if variant in times}
            self.rows[variant] = self._row(variant).with_(note=note, **of_time, **harness.provenance(self.device))
        results.write(self.path, [self.rows[variant] for variant in variants])

    @property
    def is_done(self) -> bool:
        return self.present in self.rows and self.rows[self.present].note.startswith(FINAL)

    @property
    def ranking(self) -> list[Row]:
        """What the turns with the present row gave, then the rest, each with the fastest first."""
        return sorted(self.rows.values(), key=lambda r: (not r.note.startswith(FINAL), not r.p50, r.p50 or 0.0))

    def run(self, stop_at: float, clock: Clock) -> int:
        """Measure what is not measured yet, as far as time allows. Returns how many candidates are left."""
        if clock() >= stop_at:
            return len(self.trials)
        found = survey(self.tunable, self.case)
        print(listing(found, self.case.chip), flush=True)
        pending = [variant for c in found if not c.dropped and (variant := name(c.config)) not in self.rows]
        longest = 0.0
        while not self.is_done:
            best = [row.variant for row in self.ranking if row.p50 and row.variant != self.present]
            variants, mark = (pending[:GROUP], "") if pending else ([self.present, *best[:FINALISTS]], FINAL)
            started = clock()
            if started + longest > stop_at:
                return len(pending) or len(variants)
            self.measure(variants, FINAL_SECONDS if mark else SECONDS * len(variants), mark)
            pending, longest = pending[GROUP:], max(longest, clock() - started)
        return 0

    def verdict(self) -> str:
        """The times, and the row to paste if one is faster than the present one beyond both spreads."""
        present, lines = self.rows[self.present], []
        for row in self.ranking:
            change = f"{100 * (row.p50 / present.p50 - 1):+.1f}%" if row.p50 and present.p50 else ""
            lines.append((row.variant, row.p20, row.p50, row.p80, change, row.note))
        faster = [r for r in self.ranking if r.note.startswith(FINAL) and r.p80 and r.p80 < (present.p20 or 0.0)]
        said = f"the present row {'stays: nothing is faster beyond both spreads' if present.p50 else 'has no time'}"
        if faster:
            config = self.trials[faster[0].variant].configs[self.tunable.config]
            said = f"for kernels/launch.py, above the present row (timed in bfloat16 alone):\n    {source(config)}"
        return f"{table(['config', 'p20 ms', 'p50 ms', 'p80 ms', 'change', 'note'], lines)}\n{said}"


def main(arguments: Namespace, device: Device | None, root: Path = RESULTS, clock: Clock = time.monotonic) -> int:
    """Tune, or list the candidates where there is no GPU of that capability. Returns the exit status."""
    stop_at = clock() + 60 * arguments.minutes
    of_device = launch.capability(device.torch_device) if device else 0
    left, cases = 0, parse(arguments, of_device or 90)
    for case in cases:
        for tunable in TUNABLES[case.benchmark.op]:
            what = f"{case.benchmark.op} {case.shape.name}, bfloat16, sm_{case.capability}"
            print(f"\n{what}: {tunable.config} (pass: {tunable.pass_name})", flush=True)
            if not device or case.capability != of_device:
                print(listing(survey(tunable, case), case.chip), flush=True)
                continue
            timing = Timing(tunable, case, device, root)
            left += 0 if timing.is_done else timing.run(stop_at, clock)
            print(timing.verdict() if timing.is_done else "not finished", flush=True)
    if left:
        again = "starts over, as the tree has changes" if results.commit().endswith("+") else "resumes"
        print(f"\ncandidates left: {left}; the same command {again}")
    elif not device or cases[0].capability != of_device:
        print(f"\na GPU of compute capability {cases[0].capability / 10} times what is left: run this command there")
    return 0
