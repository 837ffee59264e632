"""`python -m tests.training.scaling`: what one rank sends per update, and whether computation hides it; writes the
tables of docs/runs.md.

On paper, for H100s: the bytes that `training/distributed.py` and `training/sharded_adamw.py` hand to collectives, the
time that they take on a ring, and the time that a step's FLOPs take at an assumed share of the peak. Padding, latency
and the few numbers on which ranks agree at each step are left out. Counted: the same bytes of a small network, on gloo
ranks (`tests/training/sent.py`).
"""

import argparse
import itertools
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.results import ROOT
from bench.tables import put_table, table
from model.gpt import PRESETS, GPTConfig
from tests.training import sent
from training.flops import flops_per_token, peak_flops

COMMAND = "python -m tests.training.scaling"
DOCUMENT = ROOT / "docs" / "runs.md"

GPU = "NVIDIA H100 80GB HBM3"
MFU = 0.4
"""share of the peak that a step reaches while it waits for nobody; assumed"""
NVLINK = 450e9
"""bytes per second that a GPU sends to others of its node: half of the 900 GB/s, both directions together, of NVIDIA's
data sheet, https://www.nvidia.com/en-us/data-center/h100/"""
NETWORK = 50e9
"""bytes per second that a node sends: 400 Gbit/s"""
GPUS_PER_NODE = 8
MOST_NODES = 64
TOTAL_BATCH = 512 * 1024
"""tokens per update of all GPUs, GPT-2's"""
MICRO_BATCH = 16 * 1024
"""most tokens of a GPU per micro-step"""
SEQUENCE_LENGTH = 1024

MODELS = ("d12", "d24", "d36", "d48")
RING = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
"""how often a rank of many sends as much as the whole tensor has"""
GLOO = RING | {"reduce-scatter": 2}
PASSES = {"forward": 1 / 3, "backward": 2 / 3}
"""shares of a micro-step's FLOPs"""


Behind = tuple[int, str]
"""a micro-step, and a pass of it"""


class Message(NamedTuple):
    """What all ranks exchange at one time of an update."""

    collective: str
    size: int
    """bytes of the whole tensors"""
    behind: Behind | None = None
    """what computes meanwhile; None if the GPU waits"""


def messages(config: GPTConfig, zero_stage: int, micro_steps: int) -> list[Message]:
    """All messages of an update under bfloat16 autocast.

    The embeddings are the first layer of a network, so their gradients are complete when the backward pass ends, and
    nothing is left to hide their reduction: at stages 0 and 1 in DDP's last bucket, at 2 and 3 in FSDP2's root.
    """
    C, L = config.n_embd, config.n_layer
    whole = 4 * config.num_params()
    of_blocks = L * (12 * C * C + 9 * C)  # matrices and their biases, which FSDP2 gathers by the block
    root = whole - 4 * of_blocks  # embeddings and LayerNorms
    backward = (micro_steps - 1, "backward")
    if zero_stage < 2:
        embeddings = 4 * (config.vocab_size + config.block_size) * C
        reduced = [Message("all-reduce", whole - embeddings, backward), Message("all-reduce", embeddings)]
        exchanged = [Message("all-gather", whole)]  # of the updated weights, before the next forward pass
        return reduced + exchanged if zero_stage == 1 else reduced
    gathers = [(0, "forward")] if zero_stage == 2 else list(itertools.product(range(micro_steps), PASSES))
    return [
        *(Message("all-gather", root) for _ in gathers),
        *(Message("all-gather", 2 * of_blocks, behind) for behind in gathers),
        Message("reduce-scatter", 4 * of_blocks, backward),
        Message("reduce-scatter", root),
    ]


def bytes_sent(exchanged: Iterable[Message], ranks: int, factors: Mapping[str, int] = RING) -> float:
    """Bytes that each rank sends."""
    return sum(factors[message.collective] * message.size for message in exchanged) * (ranks - 1) / ranks


def bandwidth(ranks: int) -> float:
    """Bytes per second of a ring: it leaves each node once, so the node's link carries what one rank sends."""
    return NVLINK if ranks <= GPUS_PER_NODE else NETWORK


def seconds_per_token(config: GPTConfig) -> float:
    """Of a forward and a backward pass on one GPU."""
    peak = peak_flops(GPU, "bfloat16", tensorcores=0)
    return flops_per_token(config, SEQUENCE_LENGTH) / (MFU * peak)


def micro_batch(ranks: int) -> tuple[int, int]:
    """Tokens of a GPU per micro-step, and micro-steps per update, for TOTAL_BATCH."""
    tokens = TOTAL_BATCH // ranks
    return min(tokens, MICRO_BATCH), max(1, tokens // MICRO_BATCH)


def seconds_busy(config: GPTConfig, zero_stage: int, ranks: int, micro_steps: int) -> dict[Behind | None, float]:
    """How long the links are busy in an update, by what computes meanwhile."""
    busy: defaultdict[Behind | None, float] = defaultdict(float)
    for message in messages(config, zero_stage, micro_steps):
        busy[message.behind] += bytes_sent([message], ranks) / bandwidth(ranks)
    return busy


def seconds_added(config: GPTConfig, zero_stage: int, ranks: int, tokens: float, micro_steps: int) -> float:
    """By which communication makes an update longer than its computation, with so many tokens per micro-step."""
    busy = seconds_busy(config, zero_stage, ranks, micro_steps)
    hidden = {behind: PASSES[behind[1]] * tokens * seconds_per_token(config) if behind else 0.0 for behind in busy}
    return sum(max(0.0, busy[behind] - hidden[behind]) for behind in busy)


def tokens_to_hide(config: GPTConfig, zero_stage: int, ranks: int) -> float:
    """Fewest tokens of a GPU per micro-step that hide all that can be hidden."""
    busy = seconds_busy(config, zero_stage, ranks, micro_steps=1)
    return max(busy[behind] / (PASSES[behind[1]] * seconds_per_token(config)) for behind in busy if behind)


def too_many_nodes(config: GPTConfig, zero_stage: int) -> int | None:
    """Fewest nodes, a power of two, on which a GPU has too few tokens to hide what can be hidden; None if up to
    MOST_NODES, where each GPU has one sequence, it has enough."""
    for nodes in (2**i for i in range(MOST_NODES.bit_length())):
        ranks = nodes * GPUS_PER_NODE
        if micro_batch(ranks)[0] < tokens_to_hide(config, zero_stage, ranks):
            return nodes
    return None


def bytes_table() -> str:
    """What an update of one micro-step exchanges, and what a rank sends for it."""
    head = ("model", "stage", *(f"{kind}, MB" for kind in RING), "a rank of 8 sends, MB", "of it unhidden, MB")
    rows = []
    for model, stage in itertools.product(MODELS, sent.STAGES):
        exchanged = messages(PRESETS[model], stage, micro_steps=1)
        kinds = [sum(m.size for m in exchanged if m.collective == kind) / 1e6 for kind in RING]
        unhidden = [m for m in exchanged if m.behind is None]
        rows.append((model, stage, *kinds, *(bytes_sent(some, 8) / 1e6 for some in (exchanged, unhidden))))
    return table(head, rows, markdown=True)


def times_table() -> str:
    """The time of an update's computation and of its communication, on one node and on four, and what it assumes."""
    columns = ("computes, ms", "sends, ms", "adds, ms")
    head = ["model", "stage", *(f"{where}: {what}" for where in ("1 node", "4 nodes") for what in columns)]
    head += ["1 node: tokens to hide", "4 nodes: tokens to hide", "exposed from, nodes"]
    rows = []
    for model, stage in itertools.product(MODELS, sent.STAGES):
        config, row = PRESETS[model], []
        for ranks in (8, 32):
            tokens, steps = micro_batch(ranks)
            sends = bytes_sent(messages(config, stage, steps), ranks) / bandwidth(ranks)
            adds = seconds_added(config, stage, ranks, tokens, steps)
            row += [1e3 * seconds for seconds in (tokens * steps * seconds_per_token(config), sends, adds)]
        row += [tokens_to_hide(config, stage, ranks) for ranks in (8, 32)]
        rows.append((model, stage, *row, too_many_nodes(config, stage)))
    return f"{assumptions()}\n\n{table(head, rows, markdown=True)}"


def assumptions() -> str:
    """Those of the times, in words."""
    peak = peak_flops(GPU, "bfloat16", tensorcores=0)
    return textwrap.fill(
        f"Assumed: {GPU} at {100 * MFU:.0f} % of its peak of {peak / 1e12:,.0f} TFLOP/s in bf16 while it waits for "
        f"nobody; {TOTAL_BATCH:,} tokens per update, in micro-steps of at most {MICRO_BATCH:,} tokens per GPU: "
        f"{micro_batch(8)[1]} on 1 node, {micro_batch(32)[1]} on 4. Each GPU sends {NVLINK / 1e9:.0f} GB/s within a "
        f"node of {GPUS_PER_NODE}, each node {NETWORK / 1e9:.0f} GB/s.",
        width=120,
    )


def counted_table(counts: Mapping[int, Sequence[Sequence[Mapping[str, int]]]]) -> str:
    """Bytes by formula beside those counted on gloo ranks, on the rank where they differ most.

    Args:
        counts: by number of ranks, from `sent.count_on`.
    """
    head = ("stage", "ranks", "by formula", "handed over", "off, %", "by gloo's formula", "on the wire", "off, %")
    rows = []
    for stage, ranks in itertools.product(sent.STAGES, counts):
        formulas = formulas_for_small(stage, ranks)
        of_ranks = [found(of_rank[stage], ranks) for of_rank in counts[ranks]]
        row: list[float] = []
        for formula, values in zip(formulas, zip(*of_ranks, strict=True), strict=True):
            worst = max(values, key=lambda value: abs(value - formula))
            row += [round(formula), round(worst), 100 * (worst / formula - 1)]
        rows.append((stage, ranks, *row))
    return table(head, rows, markdown=True)


def on_paper() -> dict[str, str]:
    """The tables that need no ranks, by name."""
    return {"bytes": bytes_table(), "times": times_table()}


def formulas_for_small(zero_stage: int, ranks: int) -> tuple[float, float]:
    """Bytes that a rank of the network in `sent.py` sends on a ring, and by gloo's algorithms."""
    exchanged = messages(sent.SMALL, zero_stage, sent.MICRO_STEPS)
    return bytes_sent(exchanged, ranks), bytes_sent(exchanged, ranks, GLOO)


def found(counts: Mapping[str, int], ranks: int) -> tuple[float, float]:
    """What these are compared with: bytes that the rank handed to collectives, on a ring, and bytes on the wire."""
    handed = [Message(kind, size) for kind, size in counts.items() if kind != sent.WIRE]
    return bytes_sent(handed, ranks), counts[sent.WIRE]


def main() -> None:
    """The command line; see the module."""
    argparse.ArgumentParser(
        COMMAND, description="Bytes that a rank sends, and the tables of docs/runs.md."
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = {n_ranks: sent.count_on(n_ranks, Path(folder) / str(n_ranks)) for n_ranks in (2, 4)}
    for name, text in (*on_paper().items(), ("counted", counted_table(counts))):
        print(f"{text}\n")
        put_table(text, DOCUMENT, f"{COMMAND}, {name}")


if __name__ == "__main__":
    main()
