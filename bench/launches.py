"""`python -m bench launches`: what a training step launches, torch's kernels and ours by name, and the bytes that they
move outside of matrix products, without a GPU.

Torch's are counted from below: `capture.launches_of` says what is left out.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from bench import capture, pictures, step
from bench.results import PREDICTED
from bench.roofline import PARTS, part_of
from bench.tables import table
from kernels.ops import EAGER, EAGER_SDPA, Ops
from model.gpt import PRESETS


def backends() -> dict[str, Ops]:
    """Those that are compared, by name. The second is the strongest that plain PyTorch has: FlashAttention, and GELU in
    one kernel."""
    fused_gelu = EAGER_SDPA._replace(gelu=lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    return {"eager": EAGER, "sdpa + F.gelu": fused_gelu, "triton": capture.our_ops()}


class Counted(NamedTuple):
    """A training step of one backend."""

    preset: str
    backend: str
    launches: Counter
    """by name of kernel or operation"""
    bytes: Counter
    """the same"""
    matmul_bytes: int

    @property
    def bytes_outside_matmuls(self) -> int:
        return sum(self.bytes.values()) - self.matmul_bytes


def count(preset: str, backend: str, ops: Ops, dtype: torch.dtype = torch.bfloat16, **sizes) -> Counted:
    """Trace a step at 64×1024, unless sizes say otherwise, and add it up by name."""
    events = step.trace_step(PRESETS[preset], ops, dtype=dtype, **sizes).events
    launches, n_bytes = Counter(), Counter()
    for event in events:
        launches[event.name] += event.launches
        n_bytes[event.name] += event.bytes
    matmul_bytes = sum(event.bytes for event in events if event.matmul)
    return Counted(preset, backend, launches, n_bytes, matmul_bytes)


BYTES_LIMIT = 0.5
"""of the bytes outside of matrix products that sdpa + F.gelu moves"""
MODELS = ("d12", "d24", "d36", "d48")


def by_part(counter: Counter) -> dict[str, int]:
    """Launches or bytes, added up by the parts of the roofline."""
    parts = dict.fromkeys((part for part, _ in PARTS), 0)
    for name, value in counter.items():
        parts[part_of(name)] += value
    return parts


def picture(found: list[Counted], path: Path) -> None:
    """Launches and bytes of a step, by part."""
    names = [f"{c.preset}, {c.backend}" for c in found]
    canvas, axes = pictures.figure(12, 1.2 + 0.3 * len(found), 2, sharey=True)
    launches = [by_part(c.launches) for c in found]
    pictures.stacked_bars(axes[0], names, {part: [of[part] for of in launches] for part, _ in PARTS})
    axes[0].set_title("kernel launches of a training step at 64×1024, bf16", fontsize=10)
    n_bytes = [by_part(c.bytes) | {"matmul": 0} for c in found]
    pictures.stacked_bars(axes[1], names, {part: [of[part] / 1e9 for of in n_bytes] for part, _ in PARTS})
    axes[1].set_title("GB that they move, matrix products left out", fontsize=10)
    pictures.top_first(axes[0])
    pictures.legend(canvas, axes[0])
    pictures.save(canvas, path)


def main(save: bool = False) -> int:
    """Print d12 by name and all presets in sum; return 1 where ours moves more bytes than it may."""
    found = [count(preset, name, ops) for preset in MODELS for name, ops in backends().items()]
    first = [c for c in found if c.preset == MODELS[0]]
    names = sorted({name for c in first for name in c.launches}, key=lambda name: (part_of(name), name))
    print(f"launches of a training step of {MODELS[0]} at 64×1024 in bf16, by name")
    print(
        table(
            ["part", "name", *(c.backend for c in first)],
            [(part_of(n), n, *(c.launches[n] for c in first)) for n in names],
        )
    )
    print("\nin sum")
    rows = [
        (c.preset, c.backend, sum(c.launches.values()), sum(c.bytes.values()) / 1e9, c.bytes_outside_matmuls / 1e9)
        for c in found
    ]
    print(table(["preset", "backend", "launches", "GB", "GB outside matrix products"], rows))
    status = 0
    for _, best, ours in zip(found[::3], found[1::3], found[2::3], strict=True):
        share = ours.bytes_outside_matmuls / best.bytes_outside_matmuls
        print(f"{ours.preset}: triton moves {share:.3f} of the bytes of sdpa + F.gelu outside of matrix products")
        status |= ours.preset == MODELS[0] and share > BYTES_LIMIT
    if save:
        picture(found, PREDICTED / "launches.png")
    return int(status)
