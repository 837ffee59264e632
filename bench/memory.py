"""`python -m bench memory`: what is kept for the backward pass, counted with saved-tensor hooks, without a GPU.

Elements a token and layer: what a network of three layers keeps more than one of two, each storage once, parameters and
inputs aside. And of the head, the most that is alive at a time beside its inputs and gradients.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from bench import capture, pictures, step
from bench.results import PREDICTED
from bench.tables import table
from kernels.ops import EAGER, EAGER_SDPA, Ops
from model.gpt import GPT, PRESETS, GPTConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Saved(NamedTuple):
    """What one forward pass keeps."""

    elements: int
    bytes: int
    largest: int
    """elements of the largest tensor"""


def saved(config: GPTConfig, ops: Ops, dtype: torch.dtype, tokens: tuple[int, int], recompute: int = 0) -> Saved:
    """Count what autograd keeps between forward and backward.

    Args:
        config: the network.
        ops: the backend.
        dtype: of the matrix products; below fp32 by autocast.
        tokens: (B, T).
        recompute: as `GPT.set_recompute` takes it.
    """
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


def saved_per_layer(
    preset: str, ops: Ops, dtype: torch.dtype, sequence_length: int = 1024, recompute: int = 0
) -> tuple[float, float]:
    """(elements, bytes) a token that one layer keeps; copies of weights, which tokens share, are left out."""

    def count(n_layer: int, batch_size: int) -> Saved:
        config = dataclasses.replace(PRESETS[preset], n_layer=n_layer)
        return saved(config, ops, dtype, (batch_size, sequence_length), recompute)

    def slope(field: str) -> float:
        by_layers = [getattr(count(n, 2), field) - getattr(count(n, 1), field) for n in (2, 3)]
        return (by_layers[1] - by_layers[0]) / sequence_length

    return slope("elements"), slope("bytes")


def head_peak(preset: str, ops: Ops, n_rows: int = 65536) -> tuple[int, int]:
    """Most bytes alive during forward and backward of the head beyond its inputs and their gradients, and the bytes of
    the logits, both in bf16."""
    config = PRESETS[preset]
    with capture.trace() as tracing:
        hidden = torch.empty(n_rows, config.n_embd, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(config.vocab_size, config.n_embd, requires_grad=True)
        targets = torch.empty(n_rows, dtype=torch.int64)
        tracing.restart()
        gradients = 2 * hidden.numel() + 4 * weight.numel()
        before = tracing.live_bytes
        with torch.autocast("cpu", torch.bfloat16):
            ops.linear_cross_entropy(hidden, weight, targets).backward()
        peak = tracing.peak_bytes - before - gradients
    return peak, 2 * n_rows * config.vocab_size


def backends() -> dict[str, Ops]:
    """Those that are compared, by name."""
    return {"eager": EAGER, "eager + SDPA": EAGER_SDPA, "triton": capture.our_ops()}


LIMITS = (16.1, 12.1, 10.1)
"""elements a token and layer, in units of C, that the triton backend may keep at each level of `--recompute`"""
HEAD_LIMIT = 1 / 8


class Memory(NamedTuple):
    """One backend."""

    backend: str
    recompute: int
    per_layer: dict[str, float]
    """dtype -> elements a token and layer that are kept for backward, in units of C"""
    per_layer_bytes: dict[str, float]
    """dtype -> bytes a token and layer, in units of C"""
    logits_sized: bool
    """whether a tensor of a logit for each token is kept"""
    head_peak: float
    """of the bytes of the logits in bf16: most that the head has alive beside its inputs and gradients"""
    step_gb: float
    """most that is alive in a training step at 64×1024 under bf16 autocast, in 10⁹ bytes"""


def memory(preset: str = "d12") -> list[Memory]:
    """Count every backend, the triton one at each level of `--recompute`."""
    config = PRESETS[preset]
    found = []
    for name, ops in backends().items():
        for level in (0, 1, 2) if name == "triton" else (0,):
            counted = {d: saved_per_layer(preset, ops, dtype, recompute=level) for d, dtype in DTYPES.items()}
            tokens = (4, 512)
            largest = saved(dataclasses.replace(config, n_layer=1), ops, torch.bfloat16, tokens, level).largest
            peak, logits = head_peak(preset, ops)
            found.append(
                Memory(
                    name,
                    level,
                    {d: elements / config.n_embd for d, (elements, _) in counted.items()},
                    {d: n_bytes / config.n_embd for d, (_, n_bytes) in counted.items()},
                    largest >= tokens[0] * tokens[1] * config.vocab_size,
                    peak / logits,
                    step.trace_step(config, ops, recompute=level).peak_bytes / 1e9,
                )
            )
    return found


def violations(found: list[Memory]) -> list[str]:
    """Where the triton backend keeps more than it may: a line each."""
    lines = []
    for m in found:
        if m.backend != "triton":
            continue
        for dtype, elements in m.per_layer.items():
            if not elements <= LIMITS[m.recompute]:
                limit = LIMITS[m.recompute]
                lines.append(
                    f"triton, recompute {m.recompute}, {dtype}: {elements:.2f}·C a layer; {limit}·C is allowed"
                )
        if m.logits_sized:
            lines.append(f"triton, recompute {m.recompute} keeps a tensor of a logit for each token")
        if not m.head_peak <= HEAD_LIMIT:
            lines.append(f"triton's head has {m.head_peak:.3f} of the logits alive; {HEAD_LIMIT} is allowed")
    return lines


def _name(m: Memory) -> str:
    return m.backend + (f", recompute {m.recompute}" if m.recompute else "")


def picture(found: list[Memory], path: Path) -> None:
    """Kept for backward, the head's peak, and what is alive in a whole step."""
    names = [_name(m) for m in found]
    canvas, axes = pictures.figure(12, 1.4 + 0.5 * len(found), 3, sharey=True)
    per_layer = {f"matmuls in {d}": [m.per_layer_bytes[d] for m in found] for d in DTYPES}
    pictures.grouped_bars(axes[0], names, per_layer, "{:.0f}")
    axes[0].set_title("kept for backward:\nbytes a token and layer, over C", fontsize=9)
    pictures.legend(canvas, axes[0])
    pictures.grouped_bars(axes[1], names, {"bf16": [m.head_peak for m in found]}, "{:.2f}", first_colour=1)
    axes[1].axvline(HEAD_LIMIT, color="black", linewidth=0.8, linestyle=":")
    axes[1].set_title("the head at 65,536 rows: most alive,\nover the logits in bf16 (dotted: 1/8)", fontsize=9)
    pictures.grouped_bars(axes[2], names, {"bf16": [m.step_gb for m in found]}, "{:.0f}", first_colour=1)
    axes[2].set_title("a step of d12 at 64×1024 in bf16:\nmost alive, GB", fontsize=9)
    pictures.top_first(axes[0])
    pictures.save(canvas, path)


def main(save: bool = False) -> int:
    """Print all of it; return 1 where the triton backend keeps more than it may."""
    found = memory()
    header = [
        *("backend", "elements/C, fp32", "elements/C, bf16", "bytes/C, fp32", "bytes/C, bf16"),
        *("logits kept", "head's peak/logits", "step, GB"),
    ]
    rows = [
        (
            _name(m),
            *(f"{per[d]:.2f}" for per in (m.per_layer, m.per_layer_bytes) for d in DTYPES),
            "yes" if m.logits_sized else "no",
            f"{m.head_peak:.3f}",
            f"{m.step_gb:.1f}",
        )
        for m in found
    ]
    print(
        "d12 at T = 1024: kept for backward a token and layer; the head at 65,536 rows; most alive in a step at 64×1024"
    )
    print(table(header, rows))
    lines = violations(found)
    print("\n".join(lines or ["the triton backend keeps no more than it may"]))
    if save:
        picture(found, PREDICTED / "memory.png")
    return 1 if lines else 0
