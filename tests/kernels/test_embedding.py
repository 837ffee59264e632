"""Token plus position embedding: ids that repeat, of any strides and out of range, positions beyond T, gradients of any
strides, and in the end bitwise identical results."""

import subprocess
import sys

import pytest
import torch

from kernels import accuracy, eager, launch
from kernels import embedding as kernel_file
from kernels.embedding import embedding
from tests.conftest import ROOT, needs_interpreter
from tests.kernels.conftest import DEVICE, assert_no_worse, dtypes, far_apart, normal

SHAPES = {  # B, T, C, V, block_size
    "no multiples": (9, 17, 300, 50, 20),
    "one of each": (1, 1, 1, 1, 1),
    "all positions": (2, 8, 64, 1000, 8),
}


def inputs_of(B: int, T: int, C: int, V: int, block_size: int, *, dtype: torch.dtype = torch.float32):
    idx = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(B + T)).to(DEVICE)
    return {
        "idx": idx,
        "token_weight": normal(V, C, dtype=dtype),
        "position_weight": normal(block_size, C, dtype=dtype, seed=1),
    }


def assert_no_worse_than_eager(inputs, gradient):
    summed = {"dtoken_weight": inputs["idx"].numel(), "dposition_weight": len(inputs["idx"])}
    assert_no_worse(accuracy.compare_op(embedding, eager.embedding, inputs, [gradient], summed))


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_numbers(shape, dtype):
    inputs = inputs_of(*shape, dtype=dtype)
    assert_no_worse_than_eager(inputs, normal(*shape[:3], dtype=dtype, seed=2))
    y = embedding(*inputs.values())
    assert y.dtype == dtype and y.is_contiguous() and torch.equal(y, eager.embedding(*inputs.values()))


def test_what_was_not_there_gets_exactly_nothing():
    inputs = inputs_of(2, 3, 40, 50, 7)
    results = accuracy.outputs_and_gradients(embedding, inputs, [normal(2, 3, 40, mean=9.0)])
    assert not results["dposition_weight"][3:].any() and results["dposition_weight"][:3].all()
    there = torch.zeros(50, dtype=torch.bool, device=DEVICE).index_fill(0, inputs["idx"].flatten(), True)
    assert not results["dtoken_weight"][~there].any() and results["dtoken_weight"][there].all()


def test_a_result_narrower_than_the_weights():
    """Rounded once, after the sum; and the positions' gradient is not summed in 16 bits."""

    def narrow(function):
        return lambda *args: function(*args, dtype=None if args[1].dtype == torch.float64 else torch.bfloat16)

    inputs = inputs_of(9, 17, 40, 50, 20)
    summed = {"dtoken_weight": 9 * 17, "dposition_weight": 9}
    dy = normal(9, 17, 40, dtype=torch.bfloat16, seed=2)
    forms = narrow(embedding), narrow(eager.embedding)
    assert_no_worse(accuracy.compare_op(*forms, inputs, [dy], summed))
    y, want = (form(*inputs.values()) for form in forms)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    dposition = accuracy.outputs_and_gradients(forms[0], inputs, [dy])["dposition_weight"]
    assert not torch.equal(dposition, dposition.bfloat16().float())


def test_weights_of_two_dtypes():
    inputs = inputs_of(3, 5, 40, 11, 6)
    inputs["position_weight"] = inputs["position_weight"].bfloat16()
    assert_no_worse_than_eager(inputs, normal(3, 5, 40, seed=2))
    assert embedding(*inputs.values()).dtype == torch.float32


IDS = {
    "transposed": lambda idx: idx.t().contiguous().t(),
    "every other": lambda idx: idx.repeat_interleave(2, 1)[:, ::2],
    "a window of a stream": lambda idx: torch.cat([idx.flatten(), idx.flatten()])[3 : 3 + idx.numel()].view_as(idx),
    "one sequence": lambda idx: idx[:1].expand_as(idx),
    "int32": lambda idx: idx.int(),
}


@pytest.mark.parametrize("view", IDS.values(), ids=IDS)
def test_ids_of_any_strides(view):
    inputs = inputs_of(9, 5, 40, 50, 6)
    assert_no_worse_than_eager(inputs | {"idx": view(inputs["idx"])}, normal(9, 5, 40, seed=2))


def test_weights_of_any_strides():
    inputs = inputs_of(3, 5, 40, 50, 6)
    wide = {name: torch.cat([w, w + 1], 1)[:, 20:60] for name, w in inputs.items() if name != "idx"}
    assert_no_worse_than_eager(inputs | wide, normal(3, 5, 40, seed=2))
    apart = {name: w.t().contiguous().t() for name, w in inputs.items() if name != "idx"}
    assert_no_worse_than_eager(inputs | apart, normal(3, 5, 40, seed=2))


GRADIENTS = {
    "of a sum": lambda dy: dy[:1, :1, :1].expand_as(dy),
    "transposed": lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda dy: dy.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice": lambda dy: torch.cat([dy, dy + 1], -1)[..., 7:47],
}


@pytest.mark.parametrize("view", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_strides(view):
    assert_no_worse_than_eager(inputs_of(3, 5, 40, 50, 6), view(normal(3, 5, 40, seed=2)))


@needs_interpreter  # on a GPU it is an assertion on the device, after which the process is of no more use
@pytest.mark.parametrize("wrong", [50, -1, 2**40, -(2**40)])
def test_an_id_out_of_range(wrong):
    inputs = inputs_of(9, 5, 300, 50, 6)
    inputs["idx"][8, 2] = wrong
    with pytest.raises(IndexError, match=r"not in \[0, 50\)"):
        embedding(*inputs.values())


def test_on_a_gpu_nobody_waits_for_the_check(monkeypatch):
    asserted = []
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    monkeypatch.setattr(torch, "_assert_async", lambda is_valid, message: asserted.append(bool(is_valid)))
    inputs = inputs_of(3, 5, 40, 50, 6)
    embedding(*inputs.values())
    if DEVICE == "cpu":
        inputs["idx"][2, 4] = 50
        embedding(*inputs.values())
    assert asserted == [True, False][: len(asserted)] and len(asserted) == (2 if DEVICE == "cpu" else 1)


@pytest.mark.gpu
def test_an_id_out_of_range_on_a_gpu():
    code = (
        "from kernels import interpreter; interpreter.choose('cuda'); import torch;"
        "from kernels.embedding import embedding; w = torch.ones(5, 8, device='cuda');"
        "embedding(torch.full((2, 3), 5, device='cuda'), w, w); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "assert" in done.stderr


def test_what_is_refused():
    inputs = inputs_of(2, 7, 8, 5, 6)
    with pytest.raises(ValueError, match="7 tokens is longer than block_size 6"):
        embedding(*inputs.values())
    with pytest.raises(ValueError, match="token_weight is 8 wide, and position_weight 4"):
        embedding(inputs["idx"][:, :6], inputs["token_weight"], inputs["position_weight"][:, :4])


@pytest.mark.parametrize(("B", "T"), [(0, 5), (3, 0)])
def test_no_ids(B, T):
    inputs = inputs_of(B, T, 8, 5, 6)
    results = accuracy.outputs_and_gradients(embedding, inputs, [torch.empty(B, T, 8, device=DEVICE)])
    assert results["out0"].shape == (B, T, 8)
    assert results["dtoken_weight"].shape == (5, 8) and not results["dtoken_weight"].any()
    assert results["dposition_weight"].shape == (6, 8) and not results["dposition_weight"].any()


def test_autocast_leaves_it_alone():
    inputs = inputs_of(2, 3, 8, 5, 6)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(embedding(*inputs.values()), eager.embedding(*inputs.values()))
        results = accuracy.outputs_and_gradients(embedding, inputs, [normal(2, 3, 8)])
    assert {tensor.dtype for tensor in results.values()} == {torch.float32}


@pytest.mark.parametrize("trained", ["token_weight", "position_weight"])
def test_nothing_is_computed_for_a_frozen_weight(trained):
    inputs = inputs_of(2, 3, 8, 5, 6)
    inputs[trained].requires_grad_()
    y = embedding(*inputs.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(y, inputs[trained], normal(2, 3, 8))
    names = {event.name for event in profile.events()}
    assert ("aten::embedding_dense_backward" in names) == (trained == "token_weight")
    assert ("aten::sum" in names) == (trained == "position_weight")


def test_gradcheck():
    idx, *weights = inputs_of(3, 4, 5, 6, 7, dtype=torch.float64).values()
    weights = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(lambda *w: embedding(idx, *w), weights, fast_mode=True)


def test_opcheck():
    dtype = torch.bfloat16
    idx, *weights = inputs_of(3, 4, 5, 6, 7, dtype=dtype).values()
    torch.library.opcheck(torch.ops.tritongpt.embedding, (idx, *(w.requires_grad_() for w in weights), dtype))
    for needs in ((True, True), (True, False), (False, True)):
        given = (normal(3, 4, 5, dtype=dtype), idx, 6, 7, dtype, dtype, *needs)
        torch.library.opcheck(torch.ops.tritongpt.embedding_backward, given)


def test_compiled():
    inputs = inputs_of(3, 4, 40, 6, 7)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    want, got = (accuracy.outputs_and_gradients(op, inputs, [normal(3, 4, 40)]) for op in (embedding, compiled))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("B", [3, 800])  # torch adds few rows and many (3072 ids) in two ways
def test_run_to_run_and_a_second_backward(B):
    idx, *weights = inputs_of(B, 4, 40, 6, 7).values()
    weights = [w.requires_grad_() for w in weights]
    y, dy = embedding(idx, *weights), normal(B, 4, 40, seed=2)
    first, second = (torch.autograd.grad(y, weights, dy, retain_graph=True) for _ in range(2))
    third = torch.autograd.grad(embedding(idx, *weights), weights, dy)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, third))


@pytest.mark.usefixtures("overflow_is_reported")
def test_rows_that_are_far_apart():
    inputs = inputs_of(3, 3, 40, 3, 3)
    inputs["idx"] = torch.tensor([[2, 1, 0], [0, 1, 2], [2, 2, 2]], dtype=torch.int32, device=DEVICE)
    want = eager.embedding(*inputs.values())
    for name in inputs:
        assert torch.equal(embedding(*(inputs | {name: far_apart(inputs[name])}).values()), want)


def test_cost_is_what_goes_in_and_comes_out():
    B, T, C, V, block_size = 3, 5, 40, 50, 5
    idx, *weights = inputs_of(B, T, C, V, block_size).values()
    y = embedding(idx, *(w.requires_grad_() for w in weights))
    gradients = torch.autograd.grad(y.sum(), weights)
    # One row of token_weight for each id, whether or not they repeat.
    assert kernel_file.forward_cost(B, T, C, 4).bytes == idx.nbytes + 2 * y.nbytes + weights[1].nbytes
    backward = idx.nbytes + y.nbytes + sum(tensor.nbytes for tensor in gradients)
    assert kernel_file.backward_cost(B, T, C, V, block_size, 4).bytes == backward
