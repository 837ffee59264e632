"""LayerNorm, alone and behind an addition, at the widths of the presets."""

import torch

from bench import baselines
from bench.harness import Benchmark, Shape, normal
from kernels import eager, layer_norm
from model.gpt import PRESETS

WIDTHS = [PRESETS[name].n_embd for name in ("d12", "d24", "d36", "d48")]
SHAPES = tuple(
    Shape(f"{n_rows}×{n_cols}", {"n_rows": n_rows, "n_cols": n_cols}, {"n_rows": 64, "n_cols": n_cols})
    for n_rows in (65536, 8192)
    for n_cols in WIDTHS
)


def _inputs(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> dict:
    make = {"dtype": dtype, "device": device}
    return {
        "x": normal(n_rows, n_cols, **make) + 5,
        "weight": normal(n_cols, seed=1, std=0.2, **make) + 1,
        "bias": normal(n_cols, seed=2, **make),
    }


def _inputs_of_addition(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> dict:
    alone = _inputs(n_rows, n_cols, dtype, device)
    branch = normal(n_rows, n_cols, seed=3, dtype=dtype, device=device)
    return {"residual": alone["x"], "branch": branch, "weight": alone["weight"], "bias": alone["bias"]}


def _n_summed(n_rows: int, n_cols: int) -> dict[str, int]:
    return {"dweight": n_rows, "dbias": n_rows}


def _costs(n_rows: int, n_cols: int, itemsize: int, branch_itemsize: int = 0) -> tuple:
    sizes = (n_rows, n_cols, itemsize, itemsize, itemsize, branch_itemsize)
    return layer_norm.forward_cost(*sizes), layer_norm.backward_cost(*sizes)


BENCHMARKS = (
    Benchmark(
        op="layer_norm",
        shapes=SHAPES,
        inputs=_inputs,
        reference=eager.layer_norm,
        kernel=layer_norm.layer_norm,
        baselines=lambda: {
            "eager": eager.layer_norm,
            **baselines.compiled(eager.layer_norm),
            **baselines.installed({"liger": baselines.liger_layer_norm, "quack": baselines.quack_layer_norm}),
        },
        costs=_costs,
        n_summed=_n_summed,
    ),
    Benchmark(
        op="add_layer_norm",
        shapes=SHAPES,
        inputs=_inputs_of_addition,
        reference=eager.add_layer_norm,
        kernel=layer_norm.add_layer_norm,
        baselines=lambda: {
            "eager": eager.add_layer_norm,
            **baselines.compiled(eager.add_layer_norm),
        },
        costs=lambda itemsize, **sizes: _costs(**sizes, itemsize=itemsize, branch_itemsize=itemsize),
        n_summed=_n_summed,
    ),
)
