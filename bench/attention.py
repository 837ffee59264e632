"""Causal attention over sequence lengths: 65,536 tokens of width 768, in heads of 64 and of 128."""

import torch

from bench import baselines
from bench.capture import Launch
from bench.harness import Benchmark, Shape, normal
from kernels import attention, eager

TOKENS, WIDTH = 65536, 768
LENGTHS = (1024, 4096, 16384, 512, 2048, 8192)


PRODUCTS = {"_attention_fwd_kernel": 2, "_attention_bwd_dq_kernel": 3, "_attention_bwd_dkdv_kernel": 4}
"""matrix products that each kernel makes of a tile of scores"""


def launch_flops(noted: Launch) -> int:
    """FLOPs that a launch executes where no tile is computed in vain: the causal half; 0 for other kernels."""
    if noted.name not in PRODUCTS:
        return 0
    B, H, T, D = noted.args["q_ptr"].shape
    return PRODUCTS[noted.name] * B * H * T * T * D


def _inputs(B: int, T: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> dict:
    return {"qkv": normal(B, T, 3 * H * D, dtype=dtype, device=device), "n_head": H}


def _costs(B: int, T: int, H: int, D: int, itemsize: int) -> tuple:
    return attention.forward_cost(B, H, T, D, itemsize), attention.backward_cost(B, H, T, D, itemsize)


BENCHMARKS = (
    Benchmark(
        op="attention",
        shapes=tuple(
            Shape(
                f"{TOKENS // T}×{T}×{WIDTH // D}×{D}",
                {"B": TOKENS // T, "T": T, "H": WIDTH // D, "D": D},
                {"B": 1, "T": min(T, 2048), "H": 2, "D": D},
            )
            for T in LENGTHS
            for D in (64, 128)
        ),
        inputs=_inputs,
        reference=eager.attention,
        kernel=attention.attention,
        baselines=lambda: {
            "eager": eager.attention,
            **baselines.compiled(eager.sdpa_attention),
            **baselines.sdpa(),
            **baselines.installed(
                {
                    "flash-attn": baselines.flash_attention,
                    "flash-attn deterministic": lambda: baselines.flash_attention(deterministic=True),
                }
            ),
        },
        costs=_costs,
        ceiling="matmul",
    ),
)
