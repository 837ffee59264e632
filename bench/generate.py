"""`python -m bench generate`: greedy tokens per second of d12 on the CPU, in fp32 with random weights, against
transformers' generate, which has a cache too, and against generation without one: a whole forward pass of eager per
token."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from bench.tables import table
from kernels.ops import SDPA
from model.decoder import Decoder, pack_weights
from model.gpt import GPT, PRESETS
from model.hf import to_hf

PROMPT, NEW = 128, 128  # tokens
LENGTHS = range(PROMPT + NEW // 16, PROMPT + NEW, NEW // 8)
"""of the passes without a cache that are timed: eight of the 128, evenly spread"""


def main(rounds: int) -> int:
    """Time all in turns, and print the best and the median of each. The ids have to be equal."""
    gpt, plain, times = GPT(PRESETS["d12"], SDPA), GPT(PRESETS["d12"]), dict[tuple, list[float]]()
    theirs = to_hf(plain)
    pack_weights(gpt)

    def ours(idx: torch.Tensor) -> torch.Tensor:
        decoder = Decoder(gpt, idx, NEW)
        ids = decoder.prefill().argmax(-1)
        for _ in range(NEW - 1):
            ids = decoder.step(ids).argmax(-1)
        return decoder.append(ids)

    @torch.no_grad()
    def passes(idx: torch.Tensor) -> None:
        for length in LENGTHS:
            plain(idx.repeat(1, 2)[:, :length])

    how = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    for i in range(2 * rounds):
        B = (1, 8)[i % 2]
        idx = torch.randint(gpt.config.vocab_size, (B, PROMPT), generator=torch.Generator().manual_seed(B))
        transformers = partial(theirs.generate, idx, attention_mask=torch.ones_like(idx), **how)
        made = []
        calls: list[tuple[str, Callable, int]] = [
            ("ours", partial(ours, idx), B * NEW),
            ("transformers", transformers, B * NEW),
            ("without a cache", partial(passes, idx), B * len(LENGTHS)),
        ]
        for name, call, n_tokens in calls:
            started = time.perf_counter()
            made.append(call())
            times.setdefault((B, name), []).append((time.perf_counter() - started) / n_tokens)
        assert torch.equal(*made[:2]), "ids differ"
    rows = []
    for (B, name), of in times.items():
        best, median = ((f(of), f(of) / f(times[B, "ours"])) for f in (min, statistics.median))
        rows.append((B, name, 1 / best[0], 1 / median[0], best[1], median[1]))
    print(table(["B", "", "best tok/s", "median tok/s", "ours is × best", "× median"], rows))
    print(f"{torch.get_num_threads()} threads, {rounds} rounds; the same ids from ours and transformers")
    return 0
