"""Every op that is timed: its shapes, inputs, reference, kernel, baselines and costs. A new op is a Benchmark here."""

from collections.abc import Iterable
from types import ModuleType

import torch

from bench import baselines
from bench.harness import Benchmark, Shape, normal
from common import BadInput
from kernels import attention, cross_entropy, decode, eager, embedding, gelu, layer_norm
from kernels.cost import Cost
from model.gpt import PRESETS

WIDTHS = tuple(PRESETS[name].n_embd for name in ("d12", "d24", "d36", "d48"))
VOCABULARY = PRESETS["d12"].vocab_size


def _shape(check: dict[str, int], **sizes: int) -> Shape:
    """The name has the sizes in their order; `check` replaces some of them for the check."""
    return Shape("×".join(map(str, sizes.values())), sizes, sizes | check)


def _rows_of(*n_cols: int) -> tuple[Shape, ...]:
    """Matrices of as many rows as d12 has tokens at 64×1024, and of an eighth."""
    return tuple(_shape({"n_rows": 64}, n_rows=n_rows, n_cols=n) for n_rows in (65536, 8192) for n in n_cols)


def _costs(kernel: ModuleType, *sizes: int) -> tuple[Cost, Cost]:
    return kernel.forward_cost(*sizes), kernel.backward_cost(*sizes)


def _ids(*shape: int, device: torch.device) -> torch.Tensor:
    """int64 in [0, VOCABULARY) that depend on the arguments alone."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randint(0, VOCABULARY, shape, generator=generator, device=device)


def _layer_norm_inputs(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> dict:
    return {
        "x": normal(n_rows, n_cols, dtype=dtype, device=device) + 5,
        "weight": normal(n_cols, seed=1, std=0.2, dtype=dtype, device=device) + 1,
        "bias": normal(n_cols, seed=2, dtype=dtype, device=device),
    }


def _add_layer_norm_inputs(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> dict:
    x, weight, bias = _layer_norm_inputs(n_rows, n_cols, dtype, device).values()
    branch = normal(n_rows, n_cols, seed=3, dtype=dtype, device=device)
    branch_bias = normal(n_cols, seed=4, dtype=dtype, device=device)
    return {"residual": x, "branch": branch, "weight": weight, "bias": bias, "branch_bias": branch_bias}


def _cross_entropy_inputs(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Rows padded to a multiple of 64, as the heads that care make them."""
    padded = normal(n_rows, -(-n_cols // 64) * 64, std=2.0, dtype=dtype, device=device)
    return {"logits": padded[:, :n_cols], "targets": _ids(n_rows, device=device) % n_cols}


BENCHMARKS = (
    Benchmark(
        op="gelu",
        shapes=_rows_of(*(4 * C for C in WIDTHS)),
        inputs=lambda n_rows, n_cols, dtype, device: {"x": normal(n_rows, n_cols, dtype=dtype, device=device)},
        reference=eager.gelu,
        kernel=gelu.gelu,
        baselines=lambda: baselines.of(eager.gelu) | {"F.gelu": baselines.torch_gelu},
        costs=lambda n_rows, n_cols, itemsize: _costs(gelu, n_rows * n_cols, itemsize),
    ),
    Benchmark(
        op="layer_norm",
        shapes=_rows_of(*WIDTHS),
        inputs=_layer_norm_inputs,
        reference=eager.layer_norm,
        kernel=layer_norm.layer_norm,
        baselines=lambda: baselines.of(eager.layer_norm, baselines.LAYER_NORM),
        costs=lambda n_rows, n_cols, itemsize: _costs(layer_norm, n_rows, n_cols, itemsize, itemsize, itemsize),
        n_summed=lambda n_rows, n_cols: {"dweight": n_rows, "dbias": n_rows},
    ),
    Benchmark(
        op="add_layer_norm",
        shapes=_rows_of(*WIDTHS),
        inputs=_add_layer_norm_inputs,
        reference=eager.add_layer_norm,
        kernel=layer_norm.add_layer_norm,
        baselines=lambda: baselines.of(eager.add_layer_norm),
        costs=lambda n_rows, n_cols, itemsize: _costs(layer_norm, n_rows, n_cols, *[itemsize] * 5),
        n_summed=lambda n_rows, n_cols: {"dweight": n_rows, "dbias": n_rows, "dbranch_bias": n_rows},
    ),
    Benchmark(
        op="attention",
        shapes=tuple(
            _shape({"B": 1, "T": min(T, 2048), "H": 2}, B=65536 // T, T=T, H=768 // D, D=D)
            for T in (1024, 4096, 16384, 512, 2048, 8192)
            for D in (64, 128)
        ),
        inputs=lambda B, T, H, D, **where: {"qkv": normal(B, T, 3 * H * D, **where), "n_head": H},
        reference=eager.attention,
        kernel=attention.attention,
        baselines=lambda: {
            **baselines.of(eager.sdpa_attention, baselines.ATTENTION),
            "eager": eager.attention,
            **baselines.sdpa(),
        },
        costs=lambda B, T, H, D, itemsize: _costs(attention, B, H, T, D, itemsize),
        ceiling="matmul",
    ),
    Benchmark(
        op="decode_attention",
        shapes=tuple(_shape({"B": 1, "H": 2}, B=B, T=T, H=12, D=64) for B in (8, 64, 1) for T in (1024, 16384)),
        inputs=lambda B, T, H, D, **where: {
            "q": normal(B, H, D, **where),
            "k_cache": normal(B, H, T, D, seed=1, **where),
            "v_cache": normal(B, H, T, D, seed=2, **where),
            "lengths": torch.full((B,), T, device=where["device"]),
        },
        reference=eager.decode_attention,
        kernel=decode.decode_attention,
        baselines=lambda: baselines.of(eager.decode_attention) | {"sdpa": eager.sdpa_decode_attention},
        costs=lambda B, T, H, D, itemsize: (decode.forward_cost(B * T, B, H, D, itemsize), Cost(0, 0)),
    ),
    Benchmark(
        op="cross_entropy",
        shapes=tuple(_shape({"n_rows": 16}, n_rows=n_rows, n_cols=VOCABULARY) for n_rows in (32768, 8192, 2048)),
        inputs=_cross_entropy_inputs,
        reference=eager.cross_entropy,
        kernel=cross_entropy.cross_entropy,
        baselines=lambda: baselines.of(eager.cross_entropy, baselines.CROSS_ENTROPY),
        costs=lambda n_rows, n_cols, itemsize: _costs(cross_entropy, n_rows, n_cols, itemsize),
    ),
    Benchmark(
        op="linear_cross_entropy",
        shapes=tuple(
            _shape({"n_rows": 64}, n_rows=n_rows, width=C, n_cols=VOCABULARY)
            for n_rows in (65536, 8192)
            for C in WIDTHS
        ),
        inputs=lambda n_rows, width, n_cols, **where: {
            "hidden": normal(n_rows, width, **where),
            "weight": normal(n_cols, width, seed=1, std=0.05, **where),
            "targets": _ids(n_rows, device=where["device"]) % n_cols,
        },
        reference=eager.linear_cross_entropy,
        kernel=cross_entropy.linear_cross_entropy,
        baselines=lambda: baselines.of(eager.linear_cross_entropy, baselines.LINEAR_CROSS_ENTROPY),
        costs=lambda n_rows, width, n_cols, itemsize: (
            cross_entropy.linear_forward_cost(n_rows, n_cols, width, itemsize, itemsize),
            cross_entropy.linear_backward_cost(n_rows, n_cols, width, itemsize, itemsize),
        ),
        n_summed=lambda n_rows, width, n_cols: {"dweight": n_rows},
        ceiling="three matmuls",
        bare=baselines.three_matmuls,
        dtypes=(torch.bfloat16, torch.float16),
    ),
    Benchmark(
        op="embedding",
        shapes=tuple(_shape({"B": 2, "T": 64}, B=B, T=1024, C=C) for B in (64, 8) for C in WIDTHS),
        inputs=lambda B, T, C, **where: {
            "idx": _ids(B, T, device=where["device"]),
            "token_weight": normal(VOCABULARY, C, **where),
            "position_weight": normal(T, C, seed=1, **where),
        },
        reference=eager.embedding,
        kernel=embedding.embedding,
        baselines=lambda: baselines.of(eager.embedding),
        costs=lambda B, T, C, itemsize: (
            embedding.forward_cost(B, T, C, itemsize),
            embedding.backward_cost(B, T, C, VOCABULARY, T, itemsize),
        ),
        n_summed=lambda B, T, C: {"dtoken_weight": B * T, "dposition_weight": B},
    ),
)


def named(names: Iterable[str]) -> list[Benchmark]:
    """The benchmarks of ops, given by name or as "all".

    Raises:
        BadInput: there is no such op.
    """
    names, known = set(names), [benchmark.op for benchmark in BENCHMARKS]
    for name in sorted(names - {"all", *known}):
        raise BadInput(f"unknown op {name!r}; choose from {', '.join(known)}, or all")
    return [benchmark for benchmark in BENCHMARKS if names & {"all", benchmark.op}]
