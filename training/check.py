"""`--check 1`: is this backend right, on this machine, for this model, batch and dtype?

First op by op: the forward pass runs in eager, and the backend under test repeats every op that it calls, forward and
backward, on the same inputs at full size. Then the whole network: its loss and the gradient of every parameter. Both
must satisfy the rule of `kernels.accuracy`. Biases and LayerNorms are disturbed first: fresh ones are zero or one, and
would hide a kernel that ignores them. If something is off, repair the first op that is named: its error does not reach
the ops that are checked after it.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from common import print0
from kernels.accuracy import Comparison, Errors, as_list, compare, judge, measure, outputs_and_gradients
from kernels.ops import EAGER, FORWARD_ONLY, Ops
from model.gpt import GPT

_SLICE_BYTES = 2**28
"""of the largest float64 matrix: eager and the truth are computed and compared a few sequences at a time, because they
hold a (T, T) matrix per head, and all logits"""


def check(gpt: GPT, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> bool:
    """Compare the backend of a network with eager, and print every error beside its tolerance.

    Args:
        gpt: the network with the backend under test, in fp32 on the device. It is not changed.
        x: (B, T) int64 inputs.
        y: (B, T) int64 targets.
        dtype: fp32, or the dtype of autocast.

    Returns:
        True if every op and every gradient is within its tolerance.
    """
    gpt = _disturbed(gpt)
    off: list[str] = []

    def report(name: str, comparisons: list[Comparison]) -> None:
        worst = max(comparisons, key=lambda c: c.error / c.tolerance if c.tolerance else c.error)
        if not worst.ok:
            off.append(f"{name} ({worst.name})" if worst.name else name)
        numbers = (worst.error, worst.tolerance, worst.eager_error)
        columns = " ".join(f"{number:>10.2e}" for number in numbers)
        print0(f"{name:37} {worst.name:16} {columns}{'' if worst.ok else '   OFF'}")

    head = f"{'':16} {'error':>10} {'tolerance':>10} {'eager':>10}"
    print0(f"{'op':37} {head}")
    # The cache would keep the casts of every slice until the end of the check.
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    _compare_ops(gpt, x, y, dtype, autocast, report)
    n_ops_off = len(off)
    print0(f"\n{'loss and gradients':37} {head}")
    _compare_network(gpt, x, y, dtype, autocast, report)
    if n_ops_off:
        print0(f"\n{n_ops_off} calls of ops are off; the first: {off[0]}")
    elif off:
        print0(f"\nevery op is right by itself, and the network is off in {len(off)} places; the first: {off[0]}")
    else:
        print0("\nevery op and every gradient is no worse than eager")
    return not off


def _compare_ops(
    gpt: GPT, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, autocast: torch.autocast, report: Callable
) -> None:
    """Run the network in eager, and compare each call of an op."""
    counts = dict.fromkeys(Ops._fields, 0)
    n_slice = _slice_length(gpt, x)

    def watched(op: str) -> Callable:
        reference = getattr(EAGER, op)
        signature = inspect.signature(reference)

        def call(*inputs: Any) -> Any:
            named = signature.bind(*inputs).arguments
            outputs = _in_slices(reference, named, n_slice)
            name = f"{op} {counts[op]}"
            counts[op] += 1
            forward_only = op in FORWARD_ONLY
            report(name, _compare_call(reference, getattr(gpt.ops, op), named, outputs, n_slice, dtype, forward_only))
            return outputs if len(outputs) > 1 else outputs[0]

        return call

    watching = Ops(*(watched(op) for op in Ops._fields))

    def with_cache(qkv: torch.Tensor, n_head: int) -> torch.Tensor:
        """Attention, before which the last queries see keys and values as a cache of 1, 2, 3 ... keys."""
        q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        watching.decode_attention(q[:, :, -1], k, v, torch.arange(len(q), device=q.device) % q.shape[2] + 1)
        return watching.attention(qkv, n_head)

    with torch.no_grad(), autocast:
        _with_ops(gpt, watching._replace(attention=with_cache))(x, y, return_logits=False)
        _with_ops(gpt, EAGER._replace(cross_entropy=watching.cross_entropy))(x, y)


def _compare_call(
    reference: Callable,
    kernel: Callable,
    inputs: dict[str, Any],
    outputs: list[torch.Tensor],
    n_slice: int,
    dtype: torch.dtype,
    forward_only: bool,
) -> list[Comparison]:
    """Compare one call, with incoming gradients of unit size; that of a loss is 1."""
    generator = torch.Generator().manual_seed(42)
    # Representable in the lowest precision, so that the backend is not blamed for a rounding that eager does not make.
    gradients = [
        torch.randn(out.shape, generator=generator).to(dtype).to(out) if out.dim() else torch.ones_like(out)
        for out in outputs
        if not forward_only
    ]
    batched = _batched(inputs)
    along_batch = {f"d{name}" for name in batched}
    along_batch |= {f"out{i}" for i, out in enumerate(outputs) if out.dim()}
    errors: dict[str, Errors] = {}
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.enable_grad():
        by_kernel = outputs_and_gradients(kernel, inputs, gradients)
        for rows, part, share in _slices(inputs, n_slice):
            grads = [g[rows] if g.dim() else g * share for g in gradients]
            by_eager = outputs_and_gradients(reference, part, grads)
            with torch.autocast(outputs[0].device.type, enabled=False):
                exact = {name: _double(value) for name, value in part.items()}
                truth = outputs_and_gradients(reference, exact, [_double(g) for g in grads])
            for name in truth:
                if name not in by_kernel:
                    continue
                if name in along_batch:
                    found = measure(by_kernel[name][rows], by_eager[name], truth[name])
                    errors[name] = found.worst(errors.get(name, found))
                else:  # a weight's gradient, or a loss
                    weight = 1.0 if name.startswith("d") else share
                    eager_sum, exact_sum = sums.get(name, (0.0, 0.0))
                    sums[name] = eager_sum + weight * by_eager[name], exact_sum + weight * truth[name]
    errors |= {name: measure(by_kernel[name], *both) for name, both in sums.items()}
    first = next(iter(batched.values()))
    n_rows = first.shape[0] * first.shape[1]
    n_summed = {f"d{name}": n_rows for name in inputs if name not in batched}
    return [
        judge(name, errors[name], by_kernel[name].dtype, n_summed.get(name, 1))
        if name in by_kernel
        else Comparison(name, float("inf"), 0.0, 0.0)
        for name in truth
    ]


def _in_slices(reference: Callable, inputs: dict[str, Any], n_slice: int) -> list[torch.Tensor]:
    """The outputs of the reference, computed a few sequences at a time."""
    pieces, shares = [], []
    for _, part, share in _slices(inputs, n_slice):
        pieces.append(as_list(reference(*part.values())))
        shares.append(share)
    return [
        torch.cat(of_one) if of_one[0].dim() else sum(loss * share for loss, share in zip(of_one, shares, strict=True))
        for of_one in zip(*pieces, strict=True)
    ]


def _batched(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments whose first dimension is the batch: all tensors but the network's parameters, whose gradients are
    sums over the batch."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in tensors.items() if not isinstance(value, torch.nn.Parameter)}


def _slices(inputs: dict[str, Any], n_slice: int) -> Iterator[tuple[slice, dict[str, Any], float]]:
    """A call's inputs, a few sequences at a time: (rows of the batch, the inputs, their share of a mean)."""
    batched = _batched(inputs)
    B = len(next(iter(batched.values())))
    for start in range(0, B, n_slice):
        rows = slice(start, start + n_slice)
        part = inputs | {name: value[rows] for name, value in batched.items()}
        yield rows, part, min(n_slice, B - start) / B


def _compare_network(
    gpt: GPT, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, autocast: torch.autocast, report: Callable
) -> None:
    """Compare the loss and the gradient of every parameter."""

    def loss_and_gradients(network: GPT, n_slice: int) -> dict[str, torch.Tensor]:
        total: Any = 0.0
        for start in range(0, x.shape[0], n_slice):
            part = slice(start, start + n_slice)
            _, loss = network(x[part], y[part], return_logits=False)
            loss = loss * (len(x[part]) / len(x))
            loss.backward()
            total = total + loss.detach()
        grads = {name: param.grad for name, param in network.named_parameters() if param.grad is not None}
        return {"loss": total} | grads

    n_slice = _slice_length(gpt, x)
    with autocast:
        by_kernel = loss_and_gradients(_with_ops(gpt, gpt.ops), x.shape[0])
        by_eager = loss_and_gradients(_with_ops(gpt, EAGER), n_slice)
    exact = _with_ops(gpt, EAGER).double()
    exact.residual_dtype = None
    truth = loss_and_gradients(exact, n_slice)
    for name in truth:
        n_summed = 1 if name == "loss" else x.numel()
        if name in by_kernel:
            tensors = by_kernel[name], by_eager[name], truth[name]
            comparison = compare("", *tensors, n_summed, inner=dtype, n_averaged=x.numel())
        else:
            comparison = Comparison("", float("inf"), 0.0, 0.0)
        report(name.removeprefix("transformer."), [comparison])


def _with_ops(gpt: GPT, ops: Ops) -> GPT:
    """A copy of the network with another backend."""
    copy = GPT(gpt.config, ops, init=False)
    copy.load_state_dict(gpt.state_dict())
    copy.residual_dtype = gpt.residual_dtype
    return copy.to(next(gpt.parameters()).device)


def _disturbed(gpt: GPT) -> GPT:
    """A copy of the network in which no bias is zero and no LayerNorm's weight one."""
    copy = _with_ops(gpt, gpt.ops)
    generator = torch.Generator().manual_seed(42)
    with torch.no_grad():
        for param in copy.parameters():
            if param.dim() == 1:
                param.data += 0.1 * torch.randn(param.shape, generator=generator).to(param)
    return copy


def _slice_length(gpt: GPT, x: torch.Tensor) -> int:
    T = x.shape[1]
    bytes_per_sequence = 8 * T * max(gpt.config.n_head * T, gpt.config.vocab_size)
    return max(1, _SLICE_BYTES // bytes_per_sequence)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
