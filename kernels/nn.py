"""`torch.nn.LayerNorm` and `torch.nn.functional.layer_norm` by the kernels, for networks of any kind.

    kernels.ops.triton_ops("cuda")  # chooses how kernels run, as before any import of one
    from kernels.nn import LayerNorm

Eager's are torch's own. What differs from them: there are no second derivatives, no vmap and no forward mode (errors
say so), the result is contiguous, and weight and bias may have dtypes of their own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels.dispatch import check
from kernels.layer_norm import normalise


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """LayerNorm over the last dimensions, biased variance (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Args:
        input: (..., *normalized_shape) of any strides; fp32, fp16 or bf16 (fp64 for gradcheck).
        normalized_shape: sizes of the dimensions that are normalised together, one or more.
        weight: normalized_shape, any of these dtypes; None for ones.
        bias: normalized_shape, any of these dtypes; None for zeros.
        eps: added to the variance.

    Returns:
        Shape of input, contiguous: (input − mean)/√(var + eps)·weight + bias, computed in fp32 (fp64 for fp64). Its
        dtype is that of input; under CUDA's autocast fp32, as torch's.

    Raises:
        RuntimeError: shapes do not fit; torch's own message.
        ValueError: a tensor has another dtype or device.
    """
    shape = tuple(normalized_shape)
    vectors = {name: x for name, x in (("weight", weight), ("bias", bias)) if x is not None}
    fits = bool(shape) and input.shape[-len(shape) :] == shape
    if not fits or any(vector.shape != shape for vector in vectors.values()):
        return F.layer_norm(input, shape, weight, bias, eps)  # raises
    check("layer_norm", {"input": input} | vectors)
    dtype = input.dtype
    if input.is_cuda and torch.is_autocast_enabled("cuda") and dtype != torch.float64:
        dtype = torch.float32
    n_cols = input.shape[-len(shape) :].numel()
    rows = input.reshape(*input.shape[: -len(shape)], n_cols)
    flat = (None if x is None else x.reshape(n_cols) for x in (weight, bias))
    return normalise(rows, *flat, dtype, float(eps)).view(input.shape)


class LayerNorm(torch.nn.LayerNorm):
    """Takes the place of `torch.nn.LayerNorm`: same arguments, attributes and state_dict."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., *normalized_shape) -> same shape"""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
