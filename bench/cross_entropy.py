"""Cross-entropy of GPT-2's vocabulary, and the whole head at the widths of the presets."""

import torch

from bench import baselines
from bench.harness import Benchmark, Shape, normal
from kernels import cross_entropy, eager
from model.gpt import PRESETS

VOCABULARY = 50257


def _targets(n_rows: int, n_cols: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(n_rows)
    return torch.randint(0, n_cols, (n_rows,), generator=generator, device=device)


def _inputs(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Rows padded to a multiple of 64, as the heads that care make them."""
    padded = normal(n_rows, -(-n_cols // 64) * 64, std=2.0, dtype=dtype, device=device)
    return {"logits": padded[:, :n_cols], "targets": _targets(n_rows, n_cols, device)}


def _inputs_of_head(n_rows: int, n_cols: int, width: int, dtype: torch.dtype, device: torch.device) -> dict:
    return {
        "hidden": normal(n_rows, width, dtype=dtype, device=device),
        "weight": normal(n_cols, width, seed=1, std=0.05, dtype=dtype, device=device),
        "targets": _targets(n_rows, n_cols, device),
    }


def _costs(n_rows: int, n_cols: int, itemsize: int) -> tuple:
    return (
        cross_entropy.forward_cost(n_rows, n_cols, itemsize),
        cross_entropy.backward_cost(n_rows, n_cols, itemsize),
    )


def _costs_of_head(n_rows: int, n_cols: int, width: int, itemsize: int) -> tuple:
    sizes = (n_rows, n_cols, width, itemsize, itemsize)
    return cross_entropy.linear_forward_cost(*sizes), cross_entropy.linear_backward_cost(*sizes)


BENCHMARKS = (
    Benchmark(
        op="cross_entropy",
        shapes=tuple(
            Shape(
                f"{n_rows}×{VOCABULARY}", {"n_rows": n_rows, "n_cols": VOCABULARY}, {"n_rows": 16, "n_cols": VOCABULARY}
            )
            for n_rows in (32768, 8192, 2048)
        ),
        inputs=_inputs,
        reference=eager.cross_entropy,
        kernel=cross_entropy.cross_entropy,
        baselines=lambda: {
            "eager": eager.cross_entropy,
            **baselines.compiled(eager.cross_entropy),
            **baselines.installed({"liger": baselines.liger_cross_entropy, "quack": baselines.quack_cross_entropy}),
        },
        costs=_costs,
    ),
    Benchmark(
        op="linear_cross_entropy",
        shapes=tuple(
            Shape(
                f"{n_rows}×{C}×{VOCABULARY}",
                {"n_rows": n_rows, "n_cols": VOCABULARY, "width": C},
                {"n_rows": 64, "n_cols": VOCABULARY, "width": C},
            )
            for n_rows in (65536, 8192)
            for C in (PRESETS[name].n_embd for name in ("d12", "d24", "d36", "d48"))
        ),
        inputs=_inputs_of_head,
        reference=eager.linear_cross_entropy,
        kernel=cross_entropy.linear_cross_entropy,
        baselines=lambda: {
            "eager": eager.linear_cross_entropy,
            **baselines.compiled(eager.linear_cross_entropy),
            **baselines.installed(
                {
                    "liger": baselines.liger_linear_cross_entropy,
                    "quack": baselines.quack_linear_cross_entropy,
                    "cce": baselines.cce_linear_cross_entropy,
                }
            ),
        },
        costs=_costs_of_head,
        n_summed=lambda n_rows, n_cols, width: {"dweight": n_rows},
        ceiling="three matmuls",
        bare=baselines.three_matmuls,
        dtypes=(torch.bfloat16, torch.float16),
    ),
)
