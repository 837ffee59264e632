"""Half a block as one op: no worse than eager, every bias by column sums, bitwise identical whatever is recomputed, and
only where its ops are those of the table."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import accuracy, fused_sublayer, gelu, sublayer
from kernels.ops import EAGER, Ops
from kernels.sublayer import Stream
from tests.conftest import DEVICE, TRITON
from tests.kernels.conftest import assert_no_worse, dtypes, normal

B, T, C, H = 2, 37, 24, 3
N_ROWS = B * T
SUMMED = {f"d{name}": N_ROWS for name in ("branch_bias", "norm_weight", "norm_bias", "weight", "bias")}
SUMMED |= {"dout_weight": N_ROWS, "dout_bias": N_ROWS}
KINDS = pytest.mark.parametrize("n_head", [H, 0], ids=["attention", "mlp"])


def inputs_of(n_head: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of `half`; n_head is 0 for the MLP."""
    wide = 3 * C if n_head else 4 * C
    shapes = {
        "residual": (B, T, C),
        "branch": (B, T, C),
        "branch_bias": (C,),
        "norm_weight": (C,),
        "norm_bias": (C,),
        "weight": (wide, C),
        "bias": (wide,),
        "out_weight": (C, C if n_head else wide),
        "out_bias": (C,),
    }
    stds = {"weight": C**-0.5, "out_weight": C**-0.5}
    seeds = {name: i for i, name in enumerate(shapes)}
    tensors = {n: normal(*shape, dtype=dtype, seed=seeds[n], std=stds.get(n, 1.0)) for n, shape in shapes.items()}
    return tensors | {"n_head": n_head}


def half(ops: Ops, level: int = 0, leave_bias: bool = False):
    """A function of what `inputs_of` gives: (the residual, the branch)."""

    def call(residual, branch, branch_bias, norm_weight, norm_bias, weight, bias, out_weight, out_bias, n_head):
        affines = (norm_weight, norm_bias), (weight, bias), (out_weight, out_bias)
        stream = Stream(residual, branch, branch_bias)
        if n_head:
            after = ops.attention_sublayer(stream, *affines, n_head, level, leave_bias)
        else:
            after = ops.mlp_sublayer(stream, *affines, level, leave_bias)
        assert (after.bias is not None) == (leave_bias and ops is TRITON)
        return after.residual, after.branch

    return call


@pytest.fixture
def calls(monkeypatch) -> list[int | None]:
    """n_head of the halves that ran as one op."""
    made, launched = [], fused_sublayer._sublayer

    def counted(*args):
        made.append(args[9])
        return launched(*args)

    monkeypatch.setattr(fused_sublayer, "_sublayer", counted)
    return made


def gradients(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [normal(B, T, C, dtype=dtype, seed=20 + i) for i in range(2)]


@KINDS
@dtypes
def test_numbers(n_head, dtype, calls):
    inputs = inputs_of(n_head, dtype)
    assert_no_worse(accuracy.compare_op(half(TRITON), half(EAGER), inputs, gradients(dtype), SUMMED))
    assert calls == [n_head or None]


def under_autocast(function):
    def call(*args):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=args[0].dtype != torch.float64):
            return function(*args)

    return call


@KINDS
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_numbers_under_autocast(n_head, residual_dtype, calls):
    """Parameters in fp32, the branch in bf16: gradients of parameters are not rounded to bf16 on their way."""
    inputs = inputs_of(n_head)
    inputs["residual"] = inputs["residual"].to(residual_dtype)
    inputs["branch"] = inputs["branch"].bfloat16()
    dys = [gradients()[0].bfloat16(), gradients()[1].bfloat16()]
    exact = {name: v.cpu().double() if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
    truth = results(half(EAGER), exact, [dy.cpu().double() for dy in dys])
    by_eager, found = (results(under_autocast(half(ops)), inputs, dys) for ops in (EAGER, TRITON))
    assert_no_worse(
        [  # between its ops, both round to bf16
            accuracy.compare(name, found[name], by_eager[name], truth[name], SUMMED.get(name, 1), torch.bfloat16)
            for name in truth
        ]
    )
    assert calls and found["out0"].dtype == residual_dtype and found["out1"].dtype == torch.bfloat16
    for name in ("dweight", "dout_weight", "dbias", "dbranch_bias"):
        assert found[name].dtype == torch.float32
        assert not torch.equal(found[name], found[name].bfloat16().float())


@KINDS
def test_a_bias_that_is_left_is_added_by_the_next_half(n_head):
    inputs = inputs_of(n_head)
    r, branch = half(TRITON, leave_bias=True)(*inputs.values())
    r_whole, whole = half(TRITON)(*inputs.values())
    assert torch.equal(r, r_whole)
    torch.testing.assert_close(branch + inputs["out_bias"], whole, rtol=1e-5, atol=1e-5)
    stream = Stream(r, branch, inputs["out_bias"])
    torch.testing.assert_close(stream.total(), r + whole, rtol=1e-5, atol=1e-5)
    norm = inputs["norm_weight"], inputs["norm_bias"]
    summed, normed = sublayer.add_norm(TRITON, stream, norm)
    torch.testing.assert_close(summed, r + whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normed, F.layer_norm(r + whole, (C,), *norm), rtol=1e-4, atol=1e-4)


def results(function, inputs, dys=None) -> dict[str, torch.Tensor]:
    return accuracy.outputs_and_gradients(function, inputs, dys or gradients())


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@KINDS
@pytest.mark.parametrize("ops", [TRITON, EAGER], ids=["triton", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
def test_the_same_bits_whatever_is_recomputed(n_head, ops, dtype):
    inputs = inputs_of(n_head)
    functions = [half(ops, level) for level in (0, 1, 2)]
    if dtype == torch.bfloat16:
        functions = [under_autocast(function) for function in functions]
        inputs["branch"] = inputs["branch"].bfloat16()
    kept, once, twice = (results(function, inputs) for function in functions)
    assert differing(kept, once) == differing(kept, twice) == []


@KINDS
def test_the_first_half_has_no_branch(n_head):
    """Its residual is passed on unchanged. The gradient that comes back for it is added within the op."""

    def first(ops: Ops):
        return lambda residual, *rest: half(ops)(residual, None, None, *rest)

    inputs = inputs_of(n_head)
    del inputs["branch"], inputs["branch_bias"]
    assert_no_worse(accuracy.compare_op(first(TRITON), first(EAGER), inputs, gradients(), SUMMED))
    residual = inputs["residual"].requires_grad_()
    r, _ = first(TRITON)(residual, *[v for name, v in inputs.items() if name != "residual"])
    assert r.data_ptr() == residual.data_ptr()


@KINDS
@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_is_differentiated(n_head, output):
    def one(ops: Ops):
        return lambda *args: half(ops)(*args)[output]

    inputs = inputs_of(n_head)
    leaves = {name: v.requires_grad_() for name, v in inputs.items() if isinstance(v, torch.Tensor)}
    by_backend = []
    for ops in (TRITON, EAGER):
        out = one(ops)(*leaves.values(), n_head).sum()  # an expanded gradient has no memory of its own
        by_backend.append(torch.autograd.grad(out, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*by_backend, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


@KINDS
def test_run_to_run_and_a_second_backward(n_head):
    inputs = inputs_of(n_head)
    assert differing(results(half(TRITON), inputs), results(half(TRITON), inputs)) == []
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
    outs = half(TRITON)(*leaves, n_head)
    first, second = (torch.autograd.grad(outs, leaves, gradients(), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@KINDS
def test_what_is_frozen_costs_no_product(n_head, monkeypatch):
    products, mm = [], torch.Tensor.mm
    monkeypatch.setattr(torch.Tensor, "mm", lambda a, b: products.append(1) or mm(a, b))
    inputs = inputs_of(n_head)
    every = results(half(TRITON), inputs)
    assert len(products) == 4
    leaves = {name: inputs[name].requires_grad_(name in ("residual", "bias")) for name in list(inputs)[:-1]}
    outs = half(TRITON)(*leaves.values(), n_head)
    got = torch.autograd.grad(outs, [leaves["residual"], leaves["bias"]], gradients())
    assert len(products) == 6  # those of the activations
    assert torch.equal(got[0], every["dresidual"]) and torch.equal(got[1], every["dbias"])


@KINDS
def test_no_pass_sums_a_bias(n_head, monkeypatch):
    """Only that of a bias which the matmul added, because it could not be left."""
    sums, of = [], torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda x, *args, **kwargs: sums.append(1) or of(x, *args, **kwargs))
    inputs = inputs_of(n_head)
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
    for leave_bias, n_sums in ((True, 0), (False, 1)):
        outs = half(TRITON, leave_bias=leave_bias)(*leaves, n_head)
        torch.autograd.grad(outs, leaves, gradients(), allow_unused=True)
        assert len(sums) == n_sums


def short(inputs: dict) -> list[torch.Tensor]:
    """The tensors of `inputs_of`, with one sequence of five tokens, to be differentiated."""
    tensors = {name: v for name, v in inputs.items() if name != "n_head"}
    tensors |= {name: tensors[name][:1, :5].contiguous() for name in ("residual", "branch")}
    return [tensor.requires_grad_() for tensor in tensors.values()]


@KINDS
def test_gradcheck(n_head):
    leaves = [leaf.detach().double().requires_grad_() for leaf in short(inputs_of(n_head))]
    assert torch.autograd.gradcheck(lambda *args: half(TRITON)(*args, n_head), leaves, fast_mode=True)


def test_a_second_derivative_is_refused():
    inputs = inputs_of(0)
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
    out = half(TRITON)(*leaves, 0)[1].sum()
    first = torch.autograd.grad(out, leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(first.sum(), leaves[0])


@KINDS
def test_opcheck(n_head):
    args = (*short(inputs_of(n_head)), n_head or None, 1, torch.float32)
    torch.library.opcheck(torch.ops.tritongpt.sublayer, args, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.tritongpt.sublayer, args, test_utils=("test_autograd_registration",))


def test_autocast_is_on_again_afterwards(monkeypatch):
    inputs = inputs_of(0)
    with torch.autocast(DEVICE, torch.bfloat16):
        half(TRITON)(*inputs.values())
        assert torch.is_autocast_enabled(DEVICE)
        monkeypatch.setattr(fused_sublayer, "_sublayer", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            half(TRITON)(*inputs.values())
        assert torch.is_autocast_enabled(DEVICE)


def test_only_where_its_ops_are_those_of_the_table(calls):
    for op in ("layer_norm", "add_layer_norm", "gelu", "attention"):
        mixed = TRITON._replace(**{op: getattr(EAGER, op)})
        for n_head, unused in ((H, "gelu"), (0, "attention")):
            calls.clear()
            half(mixed)(*inputs_of(n_head).values())
            assert bool(calls) == (op == unused), (op, n_head)
    half(TRITON._replace(cross_entropy=EAGER.cross_entropy))(*inputs_of(H).values())
    assert calls


def test_what_an_op_refuses_is_refused_in_its_words(calls):
    for change, message in (
        ({"residual": torch.zeros(B, T, C, dtype=torch.int64, device=DEVICE)}, "int64"),
        ({"branch": normal(B, T - 1, C)}, "differ in shape"),
        ({"norm_weight": normal(3)}, "as wide as a row"),
        ({"n_head": 5}, "n_head"),
    ):
        with pytest.raises(ValueError, match=message):
            half(TRITON)(*(inputs_of(H) | change).values())
    assert calls == []


@pytest.mark.parametrize("shape", [(0, 5), (1, 3), (5, 1024), (37, 1030), (9, 2100)])
@dtypes
def test_gelu_with_its_bias(shape, dtype):
    """As the op by itself, to the bit; and the sums are those of dx before it is rounded."""
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    dbias = torch.empty(shape[1], device=DEVICE)
    assert torch.equal(gelu.backward_with_dbias(dy, x, dbias), gelu.backward(dy, x))
    want = gelu.backward(dy.double(), x.double()).sum(0)
    assert (dbias - want).abs().max() <= 16 * max(shape[0], 1) ** 0.5 * torch.finfo(torch.float32).eps * (
        want.abs().max() + 1
    )
