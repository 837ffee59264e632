"""GELU at the widths of the MLPs."""

import torch

from bench import baselines
from bench.harness import Benchmark, Shape, normal
from kernels import eager, gelu
from model.gpt import PRESETS


def _inputs(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> dict:
    return {"x": normal(n_rows, n_cols, dtype=dtype, device=device)}


def _costs(n_rows: int, n_cols: int, itemsize: int) -> tuple:
    n_elements = n_rows * n_cols
    return gelu.forward_cost(n_elements, itemsize), gelu.backward_cost(n_elements, itemsize)


BENCHMARKS = (
    Benchmark(
        op="gelu",
        shapes=tuple(
            Shape(f"{n_rows}×{4 * C}", {"n_rows": n_rows, "n_cols": 4 * C}, {"n_rows": 64, "n_cols": 4 * C})
            for n_rows in (65536, 8192)
            for C in (PRESETS[name].n_embd for name in ("d12", "d24", "d36", "d48"))
        ),
        inputs=_inputs,
        reference=eager.gelu,
        kernel=gelu.gelu,
        baselines=lambda: {
            "eager": eager.gelu,
            "eager F.gelu": baselines.torch_gelu,
            **baselines.compiled(eager.gelu),
        },
        costs=_costs,
    ),
)
