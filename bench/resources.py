"""`python -m bench resources`: what every kernel needs of a chip, read off the machine code, without a GPU.

What a training step of d12 and of d48 launches in bf16 is compiled for sm_80, sm_90 and sm_100, with the arguments that
the launchers give.
"""

import dataclasses
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from bench import capture, machine_code, pictures, step
from bench.chips import CHIPS, Chip, occupancy
from bench.results import PREDICTED
from bench.tables import table
from model.gpt import PRESETS

CHIP_OF = {80: CHIPS["A100"], 90: CHIPS["H100"], 100: CHIPS["B200"]}
BEST_MMA = {80: "mma", 90: "wgmma", 100: "tcgen05"}


class Resources(NamedTuple):
    """One kernel, compiled."""

    kernel: str
    preset: str
    capability: int
    occupancy: float
    registers: int
    spills: int
    """bytes of stack per thread: what did not fit into registers"""
    shared: int
    """bytes per block"""
    threads: int
    load_bits: int
    """widest access to global memory of one thread; what a copy engine moves counts as 128"""
    store_bits: int
    mma: str
    """tcgen05, wgmma or mma; empty where nothing is multiplied"""
    has_dot: bool
    serialised: bool
    """whether ptxas runs wgmma one by one: it says so in a warning"""

    @property
    def chip(self) -> Chip:
        return CHIP_OF[self.capability]


def launches(preset: str, capability: int, **shape) -> list[capture.Launch]:
    """What a training step launches, in two of its layers: all layers are alike, save that the first has no addition
    before it. The head that returns logits has kernels of its own; they are in it too."""
    config = dataclasses.replace(PRESETS[preset], n_layer=2)
    ops = capture.our_ops()
    noted = step.trace_step(config, ops, capability=capability, **shape).launches
    with capture.trace(capability) as tracing:
        logits = torch.empty(64 * 1024, config.vocab_size, dtype=torch.bfloat16, requires_grad=True)
        ops.cross_entropy(logits, torch.empty(64 * 1024, dtype=torch.int64)).backward()
    return noted + tracing.launches


def resources(presets: Iterable[str] = ("d12", "d48"), capabilities: Iterable[int] = tuple(CHIP_OF)) -> list[Resources]:
    """Compile every kernel as a step of these presets launches it, each variant once."""
    variants: dict[tuple, tuple] = {}
    for preset in presets:
        for capability in capabilities:
            for noted in launches(preset, capability):
                specialised = capture.specialise(noted, capability)
                variants.setdefault(specialised.key, (specialised, noted.name, preset))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda variant: inspect(*variant), variants.values())
    return sorted(found, key=lambda r: (r.capability, r.preset, r.kernel))


def inspect(specialised: machine_code.Specialised, kernel: str, preset: str) -> Resources:
    """Compile, and read the machine code."""
    code, chip = machine_code.read(specialised), CHIP_OF[specialised.target.arch]
    of_chip = occupancy(chip, code.registers, code.shared, code.threads // 32)
    return Resources(kernel, preset, chip.capability, of_chip, **code._asdict())


def violations(found: Iterable[Resources]) -> list[str]:
    """What is below what is asked for: a line each."""
    lines = []
    for r in found:
        where = f"{r.kernel} ({r.preset}, sm_{r.capability})"
        if r.spills:
            lines.append(f"{where} spills {r.spills} bytes a thread")
        if r.shared > r.chip.shared_per_block:
            lines.append(f"{where} wants {r.shared} bytes of shared memory, and the chip has {r.chip.shared_per_block}")
        if r.has_dot and r.mma != BEST_MMA[r.capability]:
            lines.append(f"{where} multiplies by {r.mma or 'no matrix instruction'}, not {BEST_MMA[r.capability]}")
        if r.serialised:
            lines.append(f"{where}: ptxas runs wgmma one by one")
    return lines


def picture(found: list[Resources], path: Path) -> None:
    """Registers and shared memory of every kernel of d12 on every chip, against the limits."""
    kernels = list(dict.fromkeys(r.kernel for r in found))
    most = {(r.kernel, r.capability): r for r in sorted(found, key=lambda r: (r.shared, r.registers))}
    figure, axes = pictures.figure(12, 1.5 + 0.5 * len(kernels), 3, sharey=True)
    columns = {
        "registers a thread (of 255)": lambda r: float(r.registers),
        "shared memory a block, % of the chip's": lambda r: 100 * r.shared / r.chip.shared_per_block,
        "occupancy, %": lambda r: 100 * r.occupancy,
    }
    for ax, (title, value) in zip(axes, columns.items(), strict=True):
        groups = {
            f"{chip.name} (sm_{c})": [value(most[k, c]) if (k, c) in most else None for k in kernels]
            for c, chip in CHIP_OF.items()
        }
        pictures.grouped_bars(ax, kernels, groups)
        ax.set_title(title, fontsize=10)
    pictures.top_first(axes[0])
    pictures.legend(figure, axes[0])
    pictures.save(figure, path)


def main(save: bool = False) -> int:
    """Print all of it; return 1 where something is below what is asked for."""
    found = resources()
    header = [
        *("kernel", "for", "chip", "registers", "spills", "shared", "of", "threads", "occupancy"),
        *("load bits", "store bits", "matrix"),
    ]
    rows = [
        (
            *(r.kernel, r.preset, f"sm_{r.capability}", r.registers, r.spills, r.shared, r.chip.shared_per_block),
            *(r.threads, f"{100 * r.occupancy:.0f}%", r.load_bits, r.store_bits, r.mma),
        )
        for r in found
    ]
    print(table(header, rows))
    lines = violations(found)
    print("\n".join(lines or ["no spills; shared memory within limits; the chip's best matrix instructions"]))
    if save:
        picture(found, PREDICTED / "resources.png")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
