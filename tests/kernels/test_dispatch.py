"""Every op as a library's: what autograd and torch.func make of it, what it takes, and what it refuses by name."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import eager
from kernels.attention import attention, causal_attention
from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.embedding import embedding
from kernels.gelu import gelu
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.ops import FORWARD_ONLY, Ops
from tests.kernels.conftest import DEVICE, normal

TARGETS = torch.tensor([1, 0, 4], device=DEVICE)
IDX = torch.tensor([[1, 0, 4]], device=DEVICE)
FUTURE = torch.ones(3, 3, dtype=torch.bool, device=DEVICE).triu(1)


class Case(NamedTuple):
    """An op as a function of floating-point tensors alone."""

    ours: Callable
    eager: Callable | None
    inputs: tuple[torch.Tensor, ...]


CASES = {
    "gelu": Case(gelu, eager.gelu, (normal(3, 4),)),
    "layer_norm": Case(layer_norm, eager.layer_norm, (normal(3, 6), normal(6, seed=1), normal(6, seed=2))),
    "add_layer_norm": Case(
        lambda *x: sum(add_layer_norm(*x)),
        lambda *x: sum(eager.add_layer_norm(*x)),
        (normal(3, 6), normal(3, 6, seed=1), normal(6, seed=2), normal(6, seed=3)),
    ),
    "branch_bias": Case(
        lambda *x: sum(add_layer_norm(*x)),
        lambda *x: sum(eager.add_layer_norm(*x)),
        (normal(3, 6), normal(3, 6, seed=1), normal(6, seed=2), normal(6, seed=3), normal(6, seed=4)),
    ),
    "attention": Case(lambda x: attention(x, 2), lambda x: eager.attention(x, 2), (normal(1, 3, 12),)),
    "attention_qkv": Case(
        causal_attention,
        lambda q, k, v: ((q @ k.mT / 2).masked_fill(FUTURE.to(q.device), float("-inf"))).softmax(-1) @ v,
        tuple(normal(1, 2, 3, 4, seed=i) for i in range(3)),
    ),
    "cross_entropy": Case(
        lambda x: cross_entropy(x, TARGETS.to(x.device)),
        lambda x: eager.cross_entropy(x, TARGETS.to(x.device)),
        (normal(3, 5),),
    ),
    "inplace_backward": Case(
        lambda x: cross_entropy(x * 1, TARGETS.to(x.device), inplace_backward=True),
        lambda x: eager.cross_entropy(x, TARGETS.to(x.device)),
        (normal(3, 5),),
    ),
    "linear_cross_entropy": Case(
        lambda x, w: linear_cross_entropy(x, w, TARGETS.to(x.device)),
        lambda x, w: eager.linear_cross_entropy(x, w, TARGETS.to(x.device)),
        (normal(3, 4), normal(5, 4, seed=1)),
    ),
    "embedding": Case(
        lambda w, p: embedding(IDX.to(w.device), w, p),
        lambda w, p: eager.embedding(IDX.to(w.device), w, p),
        (normal(5, 4), normal(3, 4, seed=1)),
    ),
}
LINEAR = {"embedding"}
"""second derivatives are zero, and of its backward pass nobody can tell whether they were meant"""
cases = pytest.mark.parametrize("name", CASES)
FORWARD_MODE = r"jvp|forward mode"


def test_every_op_with_a_gradient_is_here():
    assert set(Ops._fields) - FORWARD_ONLY <= set(CASES)


def total(function):
    """The sum of a function's result, each element with a weight of its own."""

    def scalar(*inputs):
        y = function(*inputs)
        return (y * torch.arange(1.0, y.numel() + 1, device=y.device).view(y.shape)).sum()

    return scalar


@cases
def test_a_second_derivative_is_refused(name):
    """Through the graph of the first: never zeros, never nothing."""
    case = CASES[name]
    leaves = [x.clone().requires_grad_() for x in case.inputs]

    def penalised():
        first = torch.autograd.grad(total(case.ours)(*leaves), leaves, create_graph=True)
        (total(case.ours)(*leaves) + sum((g**2).sum() for g in first)).backward()

    if name in LINEAR:
        dy = normal(1, 3, 4).requires_grad_()
        first = torch.autograd.grad(case.ours(*leaves), leaves, dy, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            first[0].sum().backward()
        return
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        penalised()


@cases
def test_forward_mode_is_refused(name):
    case = CASES[name]
    tangents = tuple(torch.ones_like(x) for x in case.inputs)
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        torch.func.jvp(case.ours, case.inputs, tangents)
    for grad in (torch.enable_grad, torch.no_grad):
        with grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=FORWARD_MODE):
            case.ours(*(forward_ad.make_dual(x, t) for x, t in zip(case.inputs, tangents, strict=True)))


@cases
def test_forward_mode_through_a_backward_pass_is_refused(name):
    case = CASES[name]
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    y = case.ours(*leaves)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=FORWARD_MODE):
        torch.autograd.grad(y, leaves, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@cases
def test_vmap_is_refused(name):
    case = CASES[name]
    batched = tuple(torch.stack([x, x]) for x in case.inputs)
    for function in (case.ours, torch.func.grad(total(case.ours))):
        with pytest.raises(RuntimeError, match="vmap"):
            torch.vmap(function)(*batched)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.grad(lambda *x: torch.vmap(case.ours)(*x).sum())(*batched)
    # Batches of gradients go by an older vmap of torch's. It finds no memory, or no rule for what is called.
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    y = case.ours(*leaves)
    gradients = torch.stack([torch.ones_like(y)] * 2)
    if name == "embedding":  # whose backward pass is torch's
        batched = torch.autograd.grad(y, leaves, gradients, is_grads_batched=True, retain_graph=True)
        alone = torch.autograd.grad(y, leaves, gradients[0])
        assert all(torch.equal(both[1], one) for both, one in zip(batched, alone, strict=True))
    else:
        with pytest.raises(RuntimeError, match=r"vmap|doesn't have storage|Batching rule"):
            torch.autograd.grad(y, leaves, gradients, is_grads_batched=True)


@cases
def test_torch_func_grad_is_right(name):
    case = CASES[name]
    arguments = tuple(range(len(case.inputs)))
    got, want = (torch.func.grad(total(function), arguments)(*case.inputs) for function in (case.ours, case.eager))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # One argument at an inner level, another at an outer one: neither gradient is lost.
    nested = torch.func.grad(
        lambda *x: total(case.ours)(*x) + 0 * torch.func.grad(total(case.eager))(*x).sum(), len(got) - 1
    )
    torch.testing.assert_close(nested(*case.inputs), want[-1], rtol=1e-4, atol=1e-5)


@cases
def test_checkpointing_gives_the_same_bits(name):
    """It lets a backward pass read its saved tensors once."""
    case = CASES[name]
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    plain = torch.autograd.grad(total(case.ours)(*leaves), leaves)
    recomputed = total(lambda *x: checkpoint(case.ours, *x, use_reentrant=False))(*leaves)
    for one, other in zip(torch.autograd.grad(recomputed, leaves), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in CASES if name not in LINEAR])
def test_a_hessian_is_refused(name):
    case = CASES[name]
    with pytest.raises(RuntimeError, match=f"vmap|{FORWARD_MODE}|cannot be differentiated"):
        torch.func.hessian(total(case.ours))(*case.inputs)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.func.grad(lambda *x: (torch.func.grad(total(case.ours))(*x) ** 2).sum())(*case.inputs)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **kwargs or {})


@cases
def test_a_dispatch_mode_and_a_tracer_see_the_op(name):
    """And the eager way, which they cannot see, is bitwise identical."""
    case = CASES[name]
    with Seen() as seen:
        by_op = case.ours(*case.inputs)
    assert any(name.startswith("tritongpt.") for name in seen.names)
    direct = case.ours(*case.inputs)
    assert torch.equal(by_op, direct)
    traced = make_fx(case.ours)(*case.inputs)
    other = tuple(x + 0.5 for x in case.inputs)
    assert torch.equal(traced(*other), case.ours(*other))


def test_jit_trace_records_the_op():
    x = normal(3, 4)
    traced = torch.jit.trace(gelu, x)
    assert torch.equal(traced(x + 1), gelu(x + 1))


@cases
def test_on_the_meta_device(name):
    case = CASES[name]
    meta = [x.to("meta").requires_grad_() for x in case.inputs]
    got, want = case.ours(*meta), case.eager(*meta)
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    gradients = torch.autograd.grad(got.sum(), meta)
    assert [g.shape for g in gradients] == [x.shape for x in meta]


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name].inputs) > 1])
def test_a_meta_tensor_among_real_ones_is_refused(name):
    case = CASES[name]
    for i in range(len(case.inputs)):
        mixed = [x.to("meta") if i == j else x for j, x in enumerate(case.inputs)]
        with pytest.raises(ValueError, match="one device"):
            case.ours(*mixed)


def test_real_ids_among_meta_tensors_are_refused():
    with pytest.raises(ValueError, match="targets on"):
        linear_cross_entropy(normal(3, 4).to("meta"), normal(5, 4).to("meta"), TARGETS)
    with pytest.raises(ValueError, match="idx on"):
        embedding(IDX, normal(5, 4).to("meta"), normal(3, 4).to("meta"))


INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.bool),
)


@pytest.mark.parametrize(("dtype", "n_cols"), [(torch.uint8, 200), *((dtype, 300) for dtype in INTEGERS)], ids=str)
def test_integers_of_any_width(dtype, n_cols):
    """−1 is 255 in uint8, which is a class of 300 and none of 200; three targets leave most lanes of a block masked."""
    ids = torch.tensor([1, 0, 255 if (dtype, n_cols) == (torch.uint8, 300) else 1], device=DEVICE)
    logits, weight = normal(3, n_cols), normal(n_cols, 4, seed=1)
    narrow = ids.to(dtype)
    assert torch.equal(cross_entropy(torch.zeros_like(logits), narrow), cross_entropy(torch.zeros_like(logits), ids))
    calls: dict[Callable, tuple] = {cross_entropy: (logits,), linear_cross_entropy: (normal(3, 4), weight)}
    for op, inputs in calls.items():
        leaves = [x.clone().requires_grad_() for x in inputs]
        got, want = op(*leaves, narrow), op(*leaves, ids)
        assert torch.equal(got, want)
        assert all(map(torch.equal, torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)))
    tables = [weight.clone().requires_grad_(), normal(3, 4, seed=2).requires_grad_()]
    got, want = embedding(narrow[None], *tables), embedding(ids[None], *tables)
    assert torch.equal(got, want)
    assert all(map(torch.equal, torch.autograd.grad(got.sum(), tables), torch.autograd.grad(want.sum(), tables)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@cases
def test_activations_that_are_no_floats_are_refused(name, dtype):
    case = CASES[name]
    if name == "inplace_backward":
        case = Case(lambda x: cross_entropy(x, TARGETS, inplace_backward=True), None, case.inputs)
    for i in range(len(case.inputs)):
        inputs = [x.to(dtype) if i == j else x for j, x in enumerate(case.inputs)]
        with pytest.raises(ValueError, match=f"is {dtype}"):
            case.ours(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64], ids=str)
def test_targets_and_ids_that_are_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match="integers for targets"):
        cross_entropy(normal(3, 5), TARGETS.to(dtype))
    with pytest.raises(ValueError, match="integers for targets"):
        linear_cross_entropy(normal(3, 4), normal(5, 4), TARGETS.to(dtype))
    with pytest.raises(ValueError, match="integers for idx"):
        embedding(IDX.to(dtype), normal(5, 4), normal(3, 4))
