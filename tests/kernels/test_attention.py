"""Causal attention, packed and separate: lengths that no block divides, strides of all sorts, scores far out, the
blocks of every chip, nothing seen of the future, and bitwise identical results in the end."""

from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch

from kernels import accuracy, attention, eager, launch
from kernels.attention import causal_attention
from kernels.ops import EAGER
from tests.conftest import TRITON, needs_interpreter
from tests.kernels.conftest import DEVICE, DTYPES, assert_no_worse, dtypes, normal

FP32, BF16 = torch.float32, torch.bfloat16

SHAPES = (  # every length and every head_dim that has a case of its own, odd counts of sequences and heads
    *(((3, 1, 1, 16), dtype) for dtype in DTYPES.values()),
    *(((1, 3, 127, 64), dtype) for dtype in DTYPES.values()),
    *(((1, 1, 100, 80), dtype) for dtype in DTYPES.values()),
    ((1, 3, 17, 32), FP32),
    ((1, 1, 64, 64), FP32),
    ((3, 1, 100, 16), BF16),
    ((1, 1, 128, 128), BF16),
    ((1, 1, 197, 128), FP32),
    ((1, 1, 197, 1), BF16),
    ((1, 1, 256, 64), BF16),
)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, function=attention.attention) -> torch.Tensor:
    """The packed form, with the signature of the separate one: each input gets a gradient to be looked at."""
    H = q.shape[1]
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    return function(qkv, H).unflatten(-1, (H, -1)).transpose(1, 2)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return packed(q, k, v, eager.attention)


def inputs_of(*shape: int, dtype: torch.dtype = FP32) -> dict[str, torch.Tensor]:
    return {name: normal(*shape, dtype=dtype, seed=i) for i, name in enumerate(("q", "k", "v"))}


def assert_attention_no_worse(form, inputs: dict[str, torch.Tensor], do: torch.Tensor | None = None) -> None:
    q = inputs["q"]
    do = normal(*q.shape, dtype=q.dtype, seed=9) if do is None else do
    assert_no_worse(accuracy.compare_op(form, reference, inputs, [do]))


def results(form, inputs: dict, do: torch.Tensor) -> dict[str, torch.Tensor]:
    return accuracy.outputs_and_gradients(form, inputs, [do])


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_same_but_for_delta(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same bf16 bits where strides differ; on a GPU, of the output and dv alone.

    The compiler lays a tile of o and do out by their strides, so rows of o∘do are summed in another order. A delta that
    differs in its last fp32 bit may round a summand of dq and dk, and then the sum, to the other bf16 neighbour.
    Everything else is summed in the layout of the products, which no stride changes.
    """
    after_delta = [name for name in one if DEVICE == "cuda" and name in ("dq", "dk", "dqkv")]
    assert_same_bits(*({n: x for n, x in tensors.items() if n not in after_delta} for tensors in (one, other)))
    for name in after_delta:
        scale = one[name].abs().max().item()
        torch.testing.assert_close(one[name], other[name], rtol=2**-7, atol=2**-7 * scale)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_numbers(shape, dtype):
    assert_attention_no_worse(packed, inputs_of(*shape, dtype=dtype))


def tf32(x: torch.Tensor) -> torch.Tensor:
    """fp64, rounded to the 11 bits of TF32 as cvt.rna.tf32 does."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


class _TF32Matmul(torch.autograd.Function):
    """What cuBLAS makes of fp32 where TF32 is allowed, but for the rounding of sums: fp64 of rounded operands."""

    @staticmethod
    def forward(ctx, a, b):
        a, b = tf32(a), tf32(b)
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        return tf32(dc) @ b.mT, a.mT @ tf32(dc)


def attention_by(matmul):
    def function(q, k, v):
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        s = matmul(q, k.mT) * q.shape[-1] ** -0.5
        return matmul(s.masked_fill(future, float("-inf")).softmax(-1), v)

    return function


@pytest.mark.parametrize("shape", [(1, 1, 100, 64), (1, 2, 70, 33)], ids=lambda shape: "×".join(map(str, shape)))
def test_tf32_is_rounded_as_cublas_rounds_it(shape):
    """Largest error at (1, 1, 100, 64), of out, dq, dk and dv: 0.8, 0.9, 0.9 and 1.1 thousandths; 1.3, 0.9, 1.0 and 1.1
    with what cuBLAS multiplies. Operands cut off, and not rounded, gave 1.7, 3.5, 5.8 and 3.2, and results that were
    0.8 to 1.8 thousandths too small on the average."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    inputs, do = inputs_of(*shape), normal(*shape, seed=9)
    got = results(causal_attention, inputs, do)
    exactly = {name: x.cpu().double() for name, x in inputs.items()}
    truths, rounded = (
        results(attention_by(matmul), exactly, do.cpu().double()) for matmul in (torch.matmul, _TF32Matmul.apply)
    )
    assert_no_worse([accuracy.compare(name, got[name], rounded[name], truth) for name, truth in truths.items()])
    for name, truth in truths.items():
        error = got[name].cpu().double() - truth
        assert error.abs().max() > 1e-5, f"{name} is fp32"
        bias = (error * truth).sum() / truth.square().sum()
        # Rounding leaves noise, below 1e-4 here. Each operand cut off costs 2^-12 to 2^-11 of a product.
        assert bias.abs() < 2**-13, f"{name} is {bias:+.1e} off on the average"


@pytest.mark.parametrize(
    "bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x800000], ids=["GPU's NaN", "NaN", "inf", "-inf"]
)
def test_tf32_leaves_nan_and_infinity_alone(bits):
    """The NaN that a GPU makes has all bits set: rounding it up would carry into the sign, and leave −0."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    q, k, v = inputs_of(1, 1, 20, 16).values()
    v.view(torch.int32)[0, 0, 0, 3] = bits
    got = causal_attention(q, k, v)
    torch.testing.assert_close(got[..., 3], v[:, :, :1, 3].expand(1, 1, 20), rtol=0, atol=0, equal_nan=True)
    assert got.isfinite().sum() == 20 * 15


def with_scores_to(most: float, dtype: torch.dtype, T: int = 100, D: int = 64) -> dict[str, torch.Tensor]:
    q, k, v = inputs_of(1, 1, T, D).values()
    q *= most * D**0.5 / (q @ k.mT).abs().max()
    return {name: tensor.to(dtype) for name, tensor in {"q": q, "k": k, "v": v}.items()}


@dtypes
def test_scores_to_100(dtype):
    assert_attention_no_worse(packed, with_scores_to(100.0, dtype))


def test_scores_that_overflow_an_exponential():
    """Softmax is one-hot or nearly, and exp(s − lse) of a key in the future is infinite."""
    inputs = with_scores_to(5000.0, FP32)
    q, k, v = inputs.values()
    do = normal(*q.shape, seed=9)
    assert (q @ k.mT / 8).triu(1).max() > 2000
    out, dq, dk, dv = accuracy.compare_op(packed, reference, inputs, [do])
    assert_no_worse([out, dv])
    # dp and delta have the same D summands where softmax is one-hot, in another order: √D ulps, and a few for o.
    ulps = 4 * 64**0.5 * torch.finfo(FP32).eps * (do @ v.mT).abs().max() / 8
    assert dq.error < ulps * k.abs().max() and dk.error < ulps * q.abs().max()


@needs_interpreter
@pytest.mark.parametrize(("T", "D"), [(197, 64), (256, 64), (130, 100)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_blocks_of_every_chip(monkeypatch, capability, T, D):
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    assert_attention_no_worse(causal_attention, inputs_of(1, 1, T, D, dtype=BF16))


STRIDED = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, ::2, 1::2],
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("of", STRIDED)
def test_separate_tensors_of_any_strides(of):
    """q, k, v and do each in another layout, which rotate; T is more than a tile, so that each steps by its own."""
    inputs, views = inputs_of(1, 3, 73, 24, dtype=BF16), list(STRIDED.values())
    i = list(STRIDED).index(of)
    do = views[(i + 3) % 5](normal(1, 3, 73, 24, dtype=BF16, seed=9))
    inputs = {name: views[(i + j) % 5](tensor) for j, (name, tensor) in enumerate(inputs.items())}
    assert len({tensor.stride() for tensor in (*inputs.values(), do)}) > 2
    assert_attention_no_worse(causal_attention, inputs, do)
    contiguous = {name: tensor.contiguous() for name, tensor in inputs.items()}
    assert_same_but_for_delta(
        results(causal_attention, inputs, do), results(causal_attention, contiguous, do.contiguous())
    )


def test_separate_and_packed_have_the_same_bits():
    inputs, do = inputs_of(2, 3, 41, 24, dtype=BF16), normal(2, 3, 41, 24, dtype=BF16, seed=9)
    assert_same_bits(results(causal_attention, inputs, do), results(packed, inputs, do))


@pytest.mark.parametrize("table", [TRITON, EAGER], ids=["triton", "eager"])
def test_the_separate_form_of_a_table(table):
    inputs, do = inputs_of(2, 3, 5, 4), normal(2, 3, 5, 4, seed=9)
    with mock.patch.object(torch, "cat", side_effect=AssertionError) if table is TRITON else nullcontext():
        got = results(table.causal_attention, inputs, do)  # the kernels do not pack
    assert_same_bits(got, results(partial(packed, function=table.attention), inputs, do))


PACKED_VIEWS = {
    "slice": lambda x: torch.cat([x, x], dim=-1)[:, :, 7 : 7 + x.shape[-1]],
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}
GRADIENTS = {
    "stride zero": lambda do: do[:1, :1, :1].expand(do.shape),
    "one row for all": lambda do: do[:1, :1].expand(do.shape),
    "slice": PACKED_VIEWS["slice"],
    "transposed": lambda do: do.permute(2, 1, 0).contiguous().permute(2, 1, 0),
}


@pytest.mark.parametrize(("view", "gradient"), list(zip(PACKED_VIEWS, GRADIENTS, strict=True)))
def test_packed_of_any_strides(view, gradient):
    """No worse than eager, and the results of contiguous tensors."""
    qkv = PACKED_VIEWS[view](normal(3, 33, 3 * 40, dtype=BF16))
    do = GRADIENTS[gradient](normal(3, 33, 40, dtype=BF16, seed=1))
    assert not qkv.is_contiguous() and not do.is_contiguous()
    inputs: dict[str, torch.Tensor | int] = {"qkv": qkv, "n_head": 2}
    contiguous: dict[str, torch.Tensor | int] = {"qkv": qkv.contiguous(), "n_head": 2}
    assert_no_worse(accuracy.compare_op(attention.attention, eager.attention, inputs, [do]))
    assert_same_but_for_delta(
        results(attention.attention, inputs, do), results(attention.attention, contiguous, do.contiguous())
    )


@pytest.mark.parametrize(("T", "D", "dtype"), [(48, 128, FP32), (33, 20, FP32), (96, 64, BF16), (33, 20, BF16)])
def test_what_lies_beyond_a_tensor_is_not_read(T, D, dtype):
    """NaNs lie there, which no mask after the load turns to 0. 48 and 96 are multiples of one block and not of both."""

    def walled(x):
        within = torch.full((1, 1, T + 64, D + 16), float("nan"), dtype=dtype, device=DEVICE)[:, :, :T, :D]
        return within.copy_(x)

    inputs, do = inputs_of(1, 1, T, D, dtype=dtype), normal(1, 1, T, D, dtype=dtype, seed=9)
    got = results(causal_attention, {name: walled(x) for name, x in inputs.items()}, walled(do))
    assert_same_bits(got, results(causal_attention, inputs, do))


@pytest.mark.usefixtures("overflow_is_reported")
@pytest.mark.parametrize("spread", [0, 1, 2], ids=["batch", "head", "position"])
def test_offsets_past_int32(spread):
    """Two steps of 2^30 elements along one dimension. No memory is committed for what lies between."""
    shape, close = [1, 1, 1, 16], [16, 16, 16, 1]
    shape[spread], close[spread] = 3, 2**30
    inputs = inputs_of(*shape, dtype=BF16) | {"do": normal(*shape, dtype=BF16, seed=9)}
    far = {name: torch.empty_strided(shape, close, dtype=BF16, device=DEVICE).copy_(x) for name, x in inputs.items()}
    one, other = (results(causal_attention, x, x.pop("do")) for x in (inputs, far))
    assert_same_bits(one, other)


def test_nothing_is_seen_of_the_future():
    T, t = 140, 70
    before, after = (inputs_of(1, 1, T, 32, dtype=BF16) for _ in range(2))
    for tensor in after.values():
        tensor[:, :, t:] = 3 * tensor[:, :, t:] + 1
    do = normal(1, 1, T, 32, dtype=BF16, seed=9)
    do[:, :, t:] = 0
    one, other = (results(packed, inputs, do) for inputs in (before, after))
    assert torch.equal(one["out0"][:, :, :t], other["out0"][:, :, :t])
    assert not torch.equal(one["out0"][:, :, t:], other["out0"][:, :, t:])
    for name in ("dq", "dk", "dv"):
        assert torch.equal(one[name][:, :, :t], other[name][:, :, :t])
        assert one[name][:, :, t:].count_nonzero() == other[name][:, :, t:].count_nonzero() == 0


@dtypes
def test_the_first_position_sees_itself_alone(dtype):
    """Its output is its value, and its query learns nothing.

    On a GPU s·scale − m is one fma, and m is rounded: p is not quite 1. p·v/p is v again once it is rounded to 16 bits,
    and in fp32 v but for half an ulp of p·v and two of the division (div.full). dq is exact: where p is put to 0, the
    product is 0.
    """
    inputs, do = inputs_of(1, 3, 20, 16, dtype=dtype), normal(1, 3, 20, 16, dtype=dtype, seed=9)
    got = results(causal_attention, inputs, do)
    rtol = 3 * torch.finfo(FP32).eps if DEVICE == "cuda" and dtype == FP32 else 0
    torch.testing.assert_close(got["out0"][:, :, 0], inputs["v"][:, :, 0], rtol=rtol, atol=0)
    assert got["dq"][:, :, 0].count_nonzero() == 0 and got["dq"][:, :, 1].count_nonzero() == 48


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)], ids=["no sequences", "no positions"])
def test_nothing(shape):
    qkv = normal(*shape).requires_grad_()
    out = attention.attention(qkv, 2)
    out.sum().backward()
    assert out.shape == (*shape[:2], 8) and qkv.grad.shape == shape
    B, T, _ = shape
    q, k, v = (normal(B, 2, T, 4).requires_grad_() for _ in range(3))
    out = causal_attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


REFUSED = {
    "head_dim": lambda: attention.attention(normal(1, 3, 3 * 129), 1),
    "head_dim of 1 to 128": lambda: causal_attention(*(normal(1, 1, 3, 129) for _ in range(3))),
    "n_head divides C": lambda: attention.attention(normal(1, 3, 24), 3),
    r"\(B, T, 3C\)": lambda: attention.attention(normal(1, 3, 25), 1),
    "0 heads": lambda: attention.attention(normal(1, 3, 24), 0),
    r"got \(5, 24\)": lambda: attention.attention(normal(5, 24), 2),
    "alike in shape": lambda: causal_attention(normal(1, 2, 3, 4), normal(1, 1, 3, 4), normal(1, 2, 3, 4)),
    "alike in": lambda: causal_attention(normal(1, 2, 3, 4), normal(1, 2, 3, 4), normal(1, 2, 3, 4).half()),
    "int32": lambda: attention.attention(torch.ones(1, 3, 24, dtype=torch.int32, device=DEVICE), 2),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=REFUSED)
def test_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [DTYPES["fp16"], BF16], ids=["fp16", "bf16"])
def test_under_autocast(dtype):
    inputs, do = inputs_of(1, 2, 20, 16), normal(1, 2, 20, 16, seed=9)
    want = results(causal_attention, {name: x.to(dtype) for name, x in inputs.items()}, do)
    for form in (causal_attention, packed):
        with torch.autocast(DEVICE, dtype):
            got = results(form, inputs, do)
        assert got.pop("out0").dtype == dtype and all(grad.dtype == FP32 for grad in got.values())
        assert_same_bits(got, {name: want[name].float() for name in got})


def test_gradcheck():
    """In float64, over more than a block; it also runs backward twice, and wants bitwise identical results."""
    q, k, v = (normal(1, 1, 19, 3, dtype=torch.float64, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(causal_attention, (q, k, v), fast_mode=True)
    qkv = normal(1, 3, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention.attention(x, 2), qkv, fast_mode=True)


def test_opcheck():
    qkv, o, lse = normal(2, 3, 3 * 4, dtype=BF16).requires_grad_(), normal(2, 3, 4, dtype=BF16), normal(2, 1, 3)
    torch.library.opcheck(torch.ops.tritongpt.attention, (qkv, 1))
    torch.library.opcheck(torch.ops.tritongpt.attention_backward, (o, qkv.detach(), o, lse, 1))
    q, k, v = (normal(1, 2, 3, 4, dtype=BF16, seed=i).requires_grad_() for i in range(3))
    o, lse = normal(1, 2, 3, 4, dtype=BF16, seed=3), normal(1, 2, 3)
    torch.library.opcheck(torch.ops.tritongpt.attention_qkv, (q, k, v))
    torch.library.opcheck(torch.ops.tritongpt.attention_qkv_backward, (o, *(x.detach() for x in (q, k, v)), o, lse))


def test_torch_compile_makes_one_graph():
    inputs, do = inputs_of(1, 2, 20, 16, dtype=BF16), normal(1, 2, 20, 16, dtype=BF16, seed=9)
    for form in (causal_attention, packed):
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        assert_same_bits(results(compiled, inputs, do), results(form, inputs, do))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_run_to_run_and_a_second_backward(dtype):
    inputs, do = inputs_of(1, 1, 70, 24, dtype=dtype), normal(1, 1, 70, 24, dtype=dtype, seed=9)
    assert_same_bits(results(packed, inputs, do), results(packed, inputs, do))
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    out = packed(*leaves)
    first, second = (torch.autograd.grad(out, leaves, do, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@needs_interpreter
@pytest.mark.parametrize("capability", [0, 80, 90, 100])
def test_no_more_tiles_than_the_diagonal_costs(monkeypatch, capability):
    """Multiplications over those of the triangle, kernel by kernel: at most 1 + BLOCK/T."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(launch, "capability", lambda device: capability)
    T, D = 256, 16
    flops, dot, launched = {}, InterpreterBuilder.create_dot, attention._launch

    def counting(kernel, op, *args):
        def counted(self, a, b, *rest):
            flops[op] = flops.get(op, 0) + 2 * a.data.size * b.data.shape[-1]
            return dot(self, a, b, *rest)

        with mock.patch.object(InterpreterBuilder, "create_dot", counted):
            launched(kernel, op, *args)

    monkeypatch.setattr(attention, "_launch", counting)
    leaves = [x.requires_grad_() for x in inputs_of(1, 1, T, D, dtype=BF16).values()]
    causal_attention(*leaves).sum().backward()
    product = attention.forward_cost(1, 1, T, D, 2).flops / 2
    assert product == attention.backward_cost(1, 1, T, D, 2).flops / 5 == T * T * D
    for op, n_products in {"attention": 2, "attention_dq": 3, "attention_dkdv": 4}.items():
        row = launch.lookup(op, leaves[0].device, 2, D)
        ratio = flops[op] / (n_products * product)
        assert 1 < ratio <= 1 + max(row.block_m, row.block_n) / T, op


@dtypes
def test_costs_are_the_bytes_of_the_tensors(dtype):
    qkv = normal(2, 7, 3 * 30, dtype=dtype)
    o, lse = torch.ops.tritongpt.attention(qkv, 3)
    assert lse.dtype == (torch.float64 if dtype == FP32 else FP32)
    forward, backward = (
        cost(2, 3, 7, 10, dtype.itemsize) for cost in (attention.forward_cost, attention.backward_cost)
    )
    assert forward.bytes == qkv.nbytes + o.nbytes + lse.nbytes
    assert backward.bytes == 2 * qkv.nbytes + 2 * o.nbytes + lse.nbytes
