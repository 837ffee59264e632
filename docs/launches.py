"""What the kernels launch for d12 on an H100, from their own launchers, without a GPU; and what docs/kernels.md says
of it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from common import BadInput, atomic_write
from kernels import attention, cross_entropy, decode, embedding, fused_sublayer, gelu, launch, layer_norm
from kernels.cost import Cost
from model.gpt import PRESETS

CAPABILITY = 90
B = 64
"""sequences per call in training, as in README's counts"""
B_DECODE = 8
"""sequences that are generated together"""
D12 = PRESETS["d12"]
T, C, H, V = D12.block_size, D12.n_embd, D12.n_head, D12.vocab_size
D = C // H
N = B * T
SHAPE = f"d12 at {B}×{T:,} tokens, launched for sm_{CAPABILITY}"
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
"""under autocast to bf16, parameters and the residual stream stay fp32"""


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gelu() -> None:
    x = _empty(N, 4 * C)
    gelu.forward(x)
    gelu.backward_with_dbias(x, x, _empty(4 * C, dtype=FP32))


def _layer_norm() -> None:
    stream, vector, branch = _empty(N, C, dtype=FP32), _empty(C, dtype=FP32), _empty(N, C)
    r, y, statistics = layer_norm.add_forward(stream, branch, vector, vector, vector, BF16)
    layer_norm.backward(y, r, r, statistics, vector, FP32, BF16, FP32, FP32)


def _attention_forward() -> None:
    attention.packed_forward(_empty(B, T, 3 * C), H)


def _attention_backward() -> None:
    qkv = _empty(B, T, 3 * C)
    o, lse = attention.packed_outputs(qkv, H)
    attention.packed_backward(o, qkv, o, lse, H, _empty(3 * C, dtype=FP32))


def _decode() -> None:
    cache = _empty(B_DECODE, H, T, D)
    decode._forward(_empty(B_DECODE, H, D), cache, cache, _empty(B_DECODE, dtype=INT64))


def _cross_entropy() -> None:
    weight, targets = _empty(V, C, dtype=FP32), _empty(N, dtype=INT64)
    cross_entropy._linear_forward(_empty(N, C), weight, targets, needs_dhidden=True, needs_dweight=True)


def _embedding() -> None:
    embedding._forward(_empty(B, T, dtype=INT64), _empty(V, C, dtype=FP32), _empty(T, C, dtype=FP32), FP32)


class Section(NamedTuple):
    """A section of docs/kernels.md."""

    run: Callable[[], None]
    """calls the launchers, forward first"""
    costs: dict[str, Cost]
    """by call"""


SECTIONS = {
    "gelu": Section(
        _gelu,
        {"forward": gelu.forward_cost(4 * N * C, 2), "backward": gelu.backward_cost(4 * N * C, 2)},
    ),
    "layer_norm": Section(
        _layer_norm,
        {
            "forward": layer_norm.forward_cost(N, C, residual=4, normed=2, weight=4, branch=2, branch_bias=4),
            "backward": layer_norm.backward_cost(N, C, residual=4, normed=2, weight=4, branch=2, branch_bias=4),
        },
    ),
    "attention_forward": Section(_attention_forward, {"forward": attention.forward_cost(B, H, T, D, 2)}),
    "attention_backward": Section(_attention_backward, {"backward": attention.backward_cost(B, H, T, D, 2)}),
    "decode": Section(_decode, {"of full caches": decode.forward_cost(B_DECODE * T, B_DECODE, H, D, 2)}),
    "cross_entropy": Section(
        _cross_entropy,
        {
            "forward": cross_entropy.linear_forward_cost(N, V, C, 2, 4),
            "backward": cross_entropy.linear_backward_cost(N, V, C, 2, 4),
        },
    ),
    "embedding": Section(
        _embedding,
        {
            "forward": embedding.forward_cost(B, T, C, 4),
            "backward": embedding.backward_cost(B, T, C, V, T, 4),
        },
    ),
}


def calls(section: str) -> list[launch.Call]:
    """The launches of a section, in their order."""
    found: list[launch.Call] = []
    with launch.DryRun(CAPABILITY, found.append):
        SECTIONS[section].run()
    return found


def saved(n_head: int | None, level: int) -> dict[str, int]:
    """Elements per token, in C, that half a block saves for backward: attention, or the MLP if n_head is None."""
    stream, branch, vector = _empty(N, C, dtype=FP32)[None], _empty(1, N, C), _empty(C, dtype=FP32)
    wide, back = (4 * C, 4 * C) if n_head is None else (3 * C, C)
    weights = _empty(wide, C, dtype=FP32), _empty(wide, dtype=FP32), _empty(C, back, dtype=FP32), None
    with launch.DryRun(CAPABILITY, lambda call: None):
        r, _, normed, _, h, x, *_ = fused_sublayer._forward(
            stream, branch, vector, vector, vector, *weights, n_head, level, BF16
        )
    return {name: t.numel() // (N * C) for name, t in (("r", r), ("normed", normed), ("h", h), ("x", x))}


def numbers(section: str) -> str:
    """What docs/kernels.md says between the markers of a section: its launches and its costs, or what it saves."""
    if section == "sublayer":
        halves = {"attention": H, "MLP": None}
        rows = [[str(level), *(f"{sum(saved(n, level).values())}·C" for n in halves.values())] for level in range(3)]
        return _table(["level of recomputation", *halves], rows)
    launched = Counter(_line(call) for call in calls(section))
    header = ["kernel", "grid", "BLOCK_M", "BLOCK_N", "warps", "stages", "registers at most"]
    rows = [[name, grid if n == 1 else f"{grid}, {n} times", *cells] for (name, grid, *cells), n in launched.items()]
    costs = [f"{name} {_metric(c.bytes)}B, {_metric(c.flops)}" for name, c in SECTIONS[section].costs.items()]
    return f"{_table(header, rows)}\n\nBytes and FLOPs per call: {'; '.join(costs)}."


def _line(call: launch.Call) -> tuple[str, ...]:
    """A launch as cells of a table."""
    grid = [size for size in call.grid if size > 1] or [1]
    found = call.args | call.options
    stages = found.get("num_stages") or found.get("NUM_STAGES")
    cells = found.get("BLOCK_M"), found.get("BLOCK_N"), found["num_warps"], stages, found.get("maxnreg")
    name = call.kernel.__name__.strip("_").removesuffix("_kernel")
    return (
        *(f"`{name}`", " × ".join(f"{size:,}" for size in grid)),
        *("" if cell is None else f"{cell:,}" for cell in cells),
    )


def _metric(n: int) -> str:
    """Three digits and a prefix."""
    scale, prefix = next((scale, prefix) for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if n >= scale)
    return f"{n / scale:.3g} {prefix}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def put_numbers(document: Path) -> None:
    """Write the numbers of each section between its two markers.

    Raises:
        BadInput: the document lacks a marker.
    """
    text = document.read_text()
    for section in (*SECTIONS, "sublayer"):
        begin, end = (f"<!-- written by python -m docs.draw_kernels: {section} {what} -->" for what in ("begin", "end"))
        if begin not in text or end not in text:
            raise BadInput(f"{document} has no lines {begin} and {end}; put them where the numbers are to be")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n\n{numbers(section)}\n\n{end}{after}"
    with atomic_write(document) as file:
        file.write(text.encode())
