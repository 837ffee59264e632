"""Token and position rows gathered and added, at the widths of the presets."""

import torch

from bench import baselines
from bench.harness import Benchmark, Shape, normal
from kernels import eager, embedding
from model.gpt import PRESETS

VOCABULARY, T = 50257, 1024


def _inputs(B: int, T: int, C: int, dtype: torch.dtype, device: torch.device) -> dict:
    generator = torch.Generator(device).manual_seed(B)
    return {
        "idx": torch.randint(0, VOCABULARY, (B, T), generator=generator, device=device),
        "token_weight": normal(VOCABULARY, C, dtype=dtype, device=device),
        "position_weight": normal(T, C, seed=1, dtype=dtype, device=device),
    }


BENCHMARKS = (
    Benchmark(
        op="embedding",
        shapes=tuple(
            Shape(f"{B}×{T}×{C}", {"B": B, "T": T, "C": C}, {"B": 2, "T": 64, "C": C})
            for B in (64, 8)
            for C in (PRESETS[name].n_embd for name in ("d12", "d24", "d36", "d48"))
        ),
        inputs=_inputs,
        reference=eager.embedding,
        kernel=embedding.embedding,
        baselines=lambda: {"eager": eager.embedding, **baselines.compiled(eager.embedding)},
        costs=lambda B, T, C, itemsize: (
            embedding.forward_cost(B, T, C, itemsize),
            embedding.backward_cost(B, T, C, VOCABULARY, T, itemsize),
        ),
        n_summed=lambda B, T, C: {"dtoken_weight": B * T, "dposition_weight": B},
    ),
)
