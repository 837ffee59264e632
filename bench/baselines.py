"""Whom the kernels are measured against: torch's own ways, and libraries where they are installed (the extra: bench).

Each adapter has the arguments of the op in kernels/eager.py, and imports its library when it is made.
"""

import importlib.util
from collections.abc import Callable, Mapping

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


def compiled(function: Callable) -> dict[str, Callable]:
    """A function under torch.compile, default and max-autotune; without CUDA graphs, which would copy the inputs."""
    return {
        "compile": torch.compile(function, dynamic=False),
        "compile max-autotune": torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs"),
    }


def sdpa() -> dict[str, Callable]:
    """scaled_dot_product_attention with each of its backends forced: what it would pick by itself is never timed."""

    def force(backend: SDPBackend) -> Callable:
        def attention(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return eager.sdpa_attention(qkv, n_head)

        return attention

    return {name: force(backend) for name, backend in SDPA.items()}


def installed(adapters: Mapping[str, Callable[[], Callable]]) -> dict[str, Callable]:
    """Make those adapters whose library is here; a name is the module, then what tells it from others of the same."""
    modules = {"liger": "liger_kernel", "flash-attn": "flash_attn", "quack": "quack", "cce": "cut_cross_entropy"}
    return {
        name: make() for name, make in adapters.items() if importlib.util.find_spec(modules[name.partition(" ")[0]])
    }


def liger_layer_norm() -> Callable:
    """Liger-Kernel 0.8, https://github.com/linkedin/Liger-Kernel"""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, eager.LAYER_NORM_EPS)


def liger_cross_entropy() -> Callable:
    """Its forward writes the gradient over the logits, so it gets a copy: whoever keeps them has to make one."""
    from liger_kernel.transformers.functional import liger_cross_entropy as function

    return lambda logits, targets: function(logits.clone(), targets, ignore_index=eager.IGNORE_INDEX)


def liger_linear_cross_entropy() -> Callable:
    """Chunks of rows, gradients in the forward pass."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

    return lambda hidden, weight, targets: function(hidden, weight, targets, ignore_index=eager.IGNORE_INDEX)


def quack_layer_norm() -> Callable:
    """QuACK 0.6, https://github.com/Dao-AILab/quack: forward and backward as functions, weights in fp32."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            y, rstd, mean = layernorm_fwd(
                x, weight.float(), bias.float(), eager.LAYER_NORM_EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, rstd, mean = ctx.saved_tensors
            dx, dweight, dbias = layernorm_bwd(x, weight.float(), dy, rstd, mean)
            return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)

    return LayerNorm.apply


def quack_cross_entropy() -> Callable:
    """In CuTe DSL, with clusters on Hopper."""
    from quack.cross_entropy import cross_entropy

    return lambda logits, targets: cross_entropy(logits, targets, ignore_index=eager.IGNORE_INDEX)


def quack_linear_cross_entropy() -> Callable:
    """Chunks of 4,096 rows, gradients in the forward pass."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as function

    return lambda hidden, weight, targets: function(hidden, weight, targets, ignore_index=eager.IGNORE_INDEX)


def cce_linear_cross_entropy() -> Callable:
    """Apple's Cut Cross-Entropy, https://arxiv.org/abs/2411.09009: never any logits; skips gradients that it takes for
    zero, which is its default."""
    from cut_cross_entropy import linear_cross_entropy as function

    return lambda hidden, weight, targets: function(hidden, weight, targets, ignore_index=eager.IGNORE_INDEX)


def flash_attention(deterministic: bool = False) -> Callable:
    """FlashAttention-2, https://arxiv.org/abs/2307.08691, on the packed tensor; its default backward adds dq up
    atomically."""
    from flash_attn import flash_attn_qkvpacked_func as function

    def attention(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
        B, T, width = qkv.shape
        packed = qkv.view(B, T, 3, n_head, width // 3 // n_head)
        return function(packed, causal=True, deterministic=deterministic).flatten(2)

    return attention


def torch_gelu(x: torch.Tensor) -> torch.Tensor:
    """torch's own kernel."""
    return F.gelu(x, approximate="tanh")


def three_matmuls(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The matrix products of the head, and nothing else: not a loss, but what any head has to pay at least."""
    return _ThreeMatmuls.apply(hidden, weight)


class _ThreeMatmuls(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, dloss):
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden
