"""How an op is called: directly in eager mode, as a custom op where torch has to see it, and what it refuses.

`torch.library.custom_op` is what torch.compile, fake tensors and dispatch modes understand. With its autograd it costs
100 to 400 µs a call, more than many a kernel runs. In eager mode nobody needs it, so there a call goes through an
`autograd.Function` of a few µs to the same launcher.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""types of tensors with memory: not fake tensors, nor other subclasses"""
_KINDS = frozenset({*PLAIN, int, float, bool, torch.dtype, type(None)})
"""types of arguments that no subclass hides behind"""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

transformed = torch._C._are_functorch_transforms_active
"""whether a transform of torch.func (grad, vmap, jvp, ...) is at work"""
_modes = torch._C._len_torch_dispatch_stack
"""how many modes see every operation: fake tensors, tracers, counters"""


def unseen(args: tuple) -> bool:
    """Whether nobody but autograd has to see a call: no compiler, no transform, no mode, and real tensors."""
    return not (
        torch.compiler.is_compiling()
        or transformed()
        or _modes()
        or torch.jit.is_tracing()
        or not _KINDS.issuperset(map(type, args))
        or args[0].is_meta
    )


def unasked_apply(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` without its question about torch.func, which `unseen` has asked."""
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
    """Register the custom op `tritongpt::name`, and return the function that calls it in the cheapest right way.

    Args:
        name: of the op.
        launch: takes tensors (the first argument is one) and numbers, all by position and annotated; returns tensors.
        fake: the same on fake tensors: shapes, strides and dtypes without the work.
        save: `setup_context(ctx, inputs, output)`, as of `autograd.Function`.
        differentiate: `backward(ctx, *gradients)`. Without it, differentiating the result is an error: the op is the
            backward pass of another one, and no op here has a second derivative.
        visible: how many of the outputs the function returns and autograd knows of; the others are for `save`. None:
            all, or the only one.
        mutates: names of the arguments that are written to.
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
        """For torch.func, which wants this form; torch itself refuses vmap and forward mode here."""

        forward = staticmethod(launch)
        setup_context = staticmethod(save_marked)
        backward = staticmethod(backward_of)

    Eager.__name__ = Eager.__qualname__ = Transformed.__name__ = Transformed.__qualname__ = name

    apply = unasked_apply(Eager)

    def call(*args: Any) -> Any:
        if unseen(args):
            # A backward pass records nothing, unless it is to be differentiated again.
            if torch.is_grad_enabled() or forward_ad._current_level >= 0:
                return apply(*args)
            return seen(launch(*args))
        if transformed() and not torch.compiler.is_compiling():
            return seen(Transformed.apply(*args))
        return seen(op(*args))

    return call


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What autocast, which does not reach custom ops, makes of a matmul's input of that dtype."""
    if device.type != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def check(op: str, floats: dict[str, torch.Tensor], integers: dict[str, torch.Tensor] | None = None) -> None:
    """Refuse, by name, what no kernel takes.

    Raises:
        ValueError: one of `floats` is not fp32, fp16, bf16 or fp64; one of `integers` holds no integers; tensors are on
            different devices.
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
