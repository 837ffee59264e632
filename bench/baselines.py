"""Baselines that the kernels are timed against: PyTorch's own ways, and libraries where they are installed.

Each takes the arguments of its op in kernels/eager.py. Libraries come with the extra `bench`; an adapter imports its
own when it is made.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import eager

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
MODULES = {"liger": "liger_kernel", "flash-attn": "flash_attn", "quack": "quack", "cce": "cut_cross_entropy"}
"""of libraries, by the first word of a baseline's name"""
Adapters = Mapping[str, Callable[[], Callable]]
"""functions that import a library and return its op, by the name of the baseline"""


def of(function: Callable, adapters: Adapters | None = None) -> dict[str, Callable]:
    """A function of kernels/eager.py, the same under torch.compile, and the libraries that are installed. Compiled
    without CUDA graphs, which would copy the inputs."""
    return {
        "eager": function,
        "compile": torch.compile(function, dynamic=False),
        "compile max-autotune": torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs"),
        **installed(adapters or {}),
    }


def installed(adapters: Adapters) -> dict[str, Callable]:
    """The ops of those libraries that are installed."""
    return {
        name: make() for name, make in adapters.items() if importlib.util.find_spec(MODULES[name.partition(" ")[0]])
    }


def sdpa() -> dict[str, Callable]:
    """scaled_dot_product_attention with each of its backends forced: what it would pick by itself is never timed."""

    def force(backend: SDPBackend) -> Callable:
        def attention(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return eager.sdpa_attention(qkv, n_head)

        return attention

    return {name: force(backend) for name, backend in SDPA.items()}


def torch_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU as one kernel of torch's."""
    return F.gelu(x, approximate="tanh")


def with_ignore_index(module: str, name: str) -> Callable:
    """A loss of a library whose arguments are the op's, and which takes ignore_index by name."""
    return partial(getattr(importlib.import_module(module), name), ignore_index=eager.IGNORE_INDEX)


def liger_layer_norm() -> Callable:
    """Liger-Kernel 0.8, https://github.com/linkedin/Liger-Kernel"""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, eager.LAYER_NORM_EPS)


def liger_cross_entropy() -> Callable:
    """Gets a copy of the logits, because its forward pass writes the gradient over them."""
    function = with_ignore_index("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda logits, targets: function(logits.clone(), targets)


def quack_layer_norm() -> Callable:
    """QuACK 0.6, https://github.com/Dao-AILab/quack: forward and backward as functions, weights in fp32."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            y, rstd, mean = layernorm_fwd(
                x, weight.float(), bias.float(), eager.LAYER_NORM_EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, weight, rstd, mean = ctx.saved_tensors
            dx, dweight, dbias = layernorm_bwd(x, weight.float(), dy, rstd, mean)
            return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)

    return LayerNorm.apply


def flash_attention(deterministic: bool = False) -> Callable:
    """FlashAttention-2, https://arxiv.org/abs/2307.08691, on the packed tensor. By default its backward adds up dq
    atomically."""
    from flash_attn import flash_attn_qkvpacked_func as function

    def attention(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
        B, T, width = qkv.shape
        packed = qkv.view(B, T, 3, n_head, width // 3 // n_head)
        return function(packed, causal=True, deterministic=deterministic).flatten(2)

    return attention


LAYER_NORM: Adapters = {"liger": liger_layer_norm, "quack": quack_layer_norm}
ATTENTION: Adapters = {
    "flash-attn": flash_attention,
    "flash-attn deterministic": partial(flash_attention, deterministic=True),
}
CROSS_ENTROPY: Adapters = {
    "liger": liger_cross_entropy,
    "quack": partial(with_ignore_index, "quack.cross_entropy", "cross_entropy"),
}
LINEAR_CROSS_ENTROPY: Adapters = {
    # In chunks of rows, with gradients in the forward pass.
    "liger": partial(with_ignore_index, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "quack": partial(with_ignore_index, "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    # Cut Cross-Entropy, https://arxiv.org/abs/2411.09009: never any logits. By default it skips small gradients.
    "cce": partial(with_ignore_index, "cut_cross_entropy", "linear_cross_entropy"),
}


class _ThreeMatmuls(torch.autograd.Function):
    """The matrix products of the head and nothing else: no loss, but the least that any head costs."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden, None


three_matmuls = _ThreeMatmuls.apply
