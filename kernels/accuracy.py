"""The definition of correct: no worse than eager.

The truth is float64 on the CPU, from the same rounded inputs. For an output and for every gradient,

    max|kernel − truth| ≤ 2·max|eager − truth| + SLACK_ULPS·max|truth|·(eps(dtype)·√n_summed + eps(inner)/√n_averaged)

At most twice the error of the reference is the rule of flash-attention's tests (tests/test_flash_attn.py in
https://github.com/Dao-AILab/flash-attention); tolerances that grow as √rows are QuACK's. Both sides round, in different
orders, so eager is sometimes closer by chance. The last term allows for that. Its second part is for a whole network:
means over many rows of numbers that were rounded to 16 bits before.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeGuard

import torch

SLACK_ULPS = 4
"""Rounding the result costs half an ulp of the largest value, and rounding intermediate values a few more; four is the
smallest power of two that covers both."""


class Comparison(NamedTuple):
    """The error of one tensor, and its tolerance."""

    name: str
    error: float
    tolerance: float
    eager_error: float

    @property
    def ok(self) -> bool:
        """True where the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


class Errors(NamedTuple):
    """Errors of a tensor, or of a part of it."""

    kernel: float
    """max|kernel − truth|"""
    eager: float
    """max|eager − truth|"""
    scale: float
    """max|truth| where the truth is finite"""

    def worst(self, other: "Errors") -> "Errors":
        """The errors of two parts of a tensor taken together."""
        return Errors(*map(max, self, other))


def measure(kernel: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> Errors:
    """Measure a tensor, or a part of it. Arguments as in `compare`. The error of a wrong shape is infinite."""
    if not kernel.shape == eager.shape == truth.shape:
        return Errors(float("inf"), 0.0, 0.0)
    if not truth.numel():
        return Errors(0.0, 0.0, 0.0)
    truth = truth.detach().double()
    # Not by a boolean index, whose int64 positions would take as much memory as the truth again.
    scale = truth.abs().nan_to_num_(nan=0.0, posinf=0.0).max().item()
    return Errors(_largest_difference(kernel, truth), _largest_difference(eager, truth), scale)


def compare(
    name: str,
    kernel: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    n_summed: int = 1,
    inner: torch.dtype | None = None,
    n_averaged: int = 1,
) -> Comparison:
    """Measure one tensor.

    Args:
        name: its name in a report.
        kernel: result of the backend under test, on any device; fp64, fp32, fp16 or bf16.
        eager: result of the reference in the same precision; its dtype may be wider.
        truth: result of the reference in float64.
        n_summed: number of rows that were summed into each element, for gradients of weights.
        inner: dtype to which intermediate results outside of the kernel were rounded; None if they were not.
        n_averaged: number of rows over which those errors average out.
    """
    return judge(name, measure(kernel, eager, truth), kernel.dtype, n_summed, inner, n_averaged)


def judge(
    name: str,
    errors: Errors,
    dtype: torch.dtype,
    n_summed: int = 1,
    inner: torch.dtype | None = None,
    n_averaged: int = 1,
) -> Comparison:
    """Apply the rule to the errors of a whole tensor. `dtype` is the kernel's; other arguments as in `compare`."""
    info = torch.finfo(dtype)
    ulps = info.eps * n_summed**0.5 + (torch.finfo(inner).eps / n_averaged**0.5 if inner else 0.0)
    # At least a few of the smallest subnormal numbers of the dtype: gradients in fp16 are that small.
    slack = SLACK_ULPS * (ulps * errors.scale + info.tiny * info.eps)
    return Comparison(name, errors.kernel, 2.0 * errors.eager + slack, errors.eager)


def _largest_difference(tensor: torch.Tensor, truth: torch.Tensor) -> float:
    """max|tensor − truth|. Equal infinities, and NaN on both sides, count as equal."""
    tensor = tensor.detach().to(truth.device, torch.float64)
    same = (tensor == truth) | (tensor.isnan() & truth.isnan())
    return (tensor - truth).abs_().masked_fill_(same, 0.0).nan_to_num_(nan=float("inf")).max().item()


def as_list(output: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of an op that returns one tensor or several."""
    return [output] if isinstance(output, torch.Tensor) else list(output)


def outputs_and_gradients(
    function: Callable[..., torch.Tensor | Sequence[torch.Tensor]],
    inputs: Mapping[str, torch.Tensor | float],
    gradients: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Call a function forward and backward.

    Args:
        function: takes the inputs in their order.
        inputs: tensors and numbers by name; floating-point tensors are differentiated.
        gradients: one per output; none to call it forward only.

    Returns:
        Outputs as "out0", "out1" …, then gradients as "d" and the name of the input.
    """
    if not gradients:
        with torch.no_grad():
            return {f"out{i}": tensor for i, tensor in enumerate(as_list(function(*inputs.values())))}
    leaves = {name: value.detach().requires_grad_() if is_float(value) else value for name, value in inputs.items()}
    outs = as_list(function(*leaves.values()))
    differentiated = {name: leaf for name, leaf in leaves.items() if is_float(leaf)}
    grads = torch.autograd.grad(
        outs, list(differentiated.values()), [g.to(o) for g, o in zip(gradients, outs, strict=True)], allow_unused=True
    )
    results = {f"out{i}": tensor.detach() for i, tensor in enumerate(outs)}
    return results | {f"d{name}": grad for name, grad in zip(differentiated, grads, strict=True) if grad is not None}


def compare_op(
    kernel: Callable,
    eager: Callable,
    inputs: Mapping[str, torch.Tensor | float],
    gradients: Sequence[torch.Tensor],
    n_summed: Mapping[str, int] | None = None,
) -> list[Comparison]:
    """Compare an op with the reference, forward and every gradient.

    Args:
        kernel: the op under test.
        eager: the reference, called in the inputs' dtype and in float64 on the CPU.
        inputs: as in `outputs_and_gradients`, on the device and in the dtype under test.
        gradients: one per output, in the dtype under test; none to compare the outputs only.
        n_summed: rows summed into each element of a gradient, by its name ("dweight"); 1 if not given.

    Returns:
        One comparison per output and per gradient.
    """
    exact_inputs = {k: v.detach().cpu().double() if is_float(v) else _on_cpu(v) for k, v in inputs.items()}
    truth = outputs_and_gradients(eager, exact_inputs, [g.detach().cpu().double() for g in gradients])
    by_eager = outputs_and_gradients(eager, inputs, gradients)
    by_kernel = outputs_and_gradients(kernel, inputs, gradients)
    if by_kernel.keys() != truth.keys():
        missing = truth.keys() ^ by_kernel.keys()
        return [Comparison(name, float("inf"), 0.0, 0.0) for name in sorted(missing)]
    return [
        compare(name, by_kernel[name], by_eager[name], truth[name], (n_summed or {}).get(name, 1)) for name in truth
    ]


def is_float(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor of floating-point numbers."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _on_cpu(value: torch.Tensor | float) -> torch.Tensor | float:
    return value.cpu() if isinstance(value, torch.Tensor) else value
