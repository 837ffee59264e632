"""Calls of ops: directly in eager mode, as a custom op where torch has to see it. Checks that all ops share.

torch.compile, fake tensors and dispatch modes understand `torch.library.custom_op`. With its autograd it costs 100 to
400 µs per call, longer than many kernels run. Eager mode does not need it: there a call reaches the same launcher
through an `autograd.Function` in a few µs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""types of tensors with memory: not fake tensors, nor other subclasses"""
_KINDS = frozenset({*PLAIN, int, float, bool, torch.dtype, type(None)})
"""types of arguments for which the direct call is safe"""
MAX_HEAD_DIM = 128
"""of attention"""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

transformed = torch._C._are_functorch_transforms_active
"""whether a transform of torch.func (grad, vmap, jvp, ...) is active"""
_modes = torch._C._len_torch_dispatch_stack
"""number of active dispatch modes: fake tensors, tracers, counters"""


def unseen(args: tuple) -> bool:
    """Whether only autograd has to see a call: no compiler, transform or mode is active, and all tensors are real."""
    return not (
        torch.compiler.is_compiling()
        or transformed()
        or _modes()
        or torch.jit.is_tracing()
        or not _KINDS.issuperset(map(type, args))
        or args[0].is_meta
    )


def unasked_apply(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` without its check for torch.func, which `unseen` has made already."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # the base is part of torch._C


def register(
    name: str,
    launch: Callable,
    fake: Callable,
    save: Callable | None = None,
    differentiate: Callable | None = None,
    visible: int | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable:
    """Register the custom op `tritongpt::name`, and return a function that calls it in the cheapest correct way.

    Args:
        name: name of the op.
        launch: takes tensors (the first argument is one) and numbers, all positional and annotated; returns tensors.
        fake: like launch, for fake tensors: outputs have the right shapes, strides and dtypes, and no values.
        save: `setup_context(ctx, inputs, output)` of an `autograd.Function`.
        differentiate: `backward(ctx, *gradients)` of one. None for the backward pass of another op, since no op here
            has a second derivative: then differentiating the result is an error.
        visible: number of outputs that the function returns and autograd sees; the others are only for `save`. None
            returns all of them.
        mutates: names of the arguments that launch writes to.
    """
    op = torch.library.custom_op(f"tritongpt::{name}", launch, mutates_args=mutates)
    op.register_fake(fake)

    def refuse(ctx: Any, *gradients: torch.Tensor) -> None:
        raise RuntimeError(f"tritongpt::{name} cannot be differentiated; for second derivatives use eager")

    def refuse_vmap(*args: Any) -> None:
        raise RuntimeError(f"tritongpt::{name} does not take vmap; use eager for it")

    def seen(output: Any) -> Any:
        return output if visible is None else output[0] if visible == 1 else output[:visible]

    def save_marked(ctx: Any, inputs: tuple, output: Any) -> None:
        if visible is not None:
            ctx.mark_non_differentiable(*output[visible:])
        if save:
            save(ctx, inputs, output)

    backward_of = differentiate or refuse
    if not mutates:  # torch accepts no formula for these
        op.register_autograd(backward_of, setup_context=save_marked)
    op.register_vmap(refuse_vmap)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = launch(*args)
            if save:
                save(ctx, args, output)
            return seen(output)

        backward = staticmethod(backward_of)

    class Transformed(torch.autograd.Function):
        """The form that torch.func needs. torch itself refuses vmap and forward mode here."""

        forward = staticmethod(launch)
        setup_context = staticmethod(save_marked)
        backward = staticmethod(backward_of)

    Eager.__name__ = Eager.__qualname__ = Transformed.__name__ = Transformed.__qualname__ = name

    apply = unasked_apply(Eager)

    def call(*args: Any) -> Any:
        if unseen(args):
            # Nothing to record in a backward pass, unless it will be differentiated again.
            if torch.is_grad_enabled() or forward_ad._current_level >= 0:
                return apply(*args)
            return seen(launch(*args))
        if transformed() and not torch.compiler.is_compiling():
            return seen(Transformed.apply(*args))
        return seen(op(*args))

    return call


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to which autocast would cast a matmul's input of this dtype. Autocast does not reach custom ops."""
    device_type = device.type  # a new string each time
    if device_type != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def check(op: str, floats: dict[str, torch.Tensor], integers: dict[str, torch.Tensor] | None = None) -> None:
    """Check the arguments of an op.

    Raises:
        ValueError: one of `floats` is not fp32, fp16, bf16 or fp64, one of `integers` is not of an integer type, or
            tensors are on different devices. Names the argument.
    """
    device = None
    for name, tensor in floats.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op} takes fp32, fp16 or bf16, and {name} is {tensor.dtype}")
        if tensor.device != (device := device or tensor.device):
            raise ValueError(f"{op} takes tensors on one device; one is on {device}, and {name} on {tensor.device}")
    for name, tensor in (integers or {}).items():
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{op} takes integers for {name}, not {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{op} takes tensors on one device; one is on {device}, and {name} on {tensor.device}")
