"""LayerNorm, alone and behind the addition: widths that are no power of two, a mean that is not 0, rows that are shared
by programs, gradients of any strides or none, and in the end bitwise identical results."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import accuracy, eager, launch
from kernels import layer_norm as kernel_file
from kernels.layer_norm import add_layer_norm, layer_norm
from tests.conftest import ROOT
from tests.kernels.conftest import DEVICE, DTYPES, assert_no_worse, far_apart, normal

FP32, BF16 = torch.float32, torch.bfloat16
WIDTHS = (
    *((width, FP32) for width in (1, 64, 768, 1023, 1024, 1280, 1600, 2100)),
    *((width, dtype) for width in (768, 1023) for dtype in (torch.float16, BF16)),
)


def inputs_of(n_rows: int, width: int, dtype: torch.dtype = FP32, mean: float = 5.0, **other_dtypes: torch.dtype):
    """residual, branch, weight, bias, branch_bias, of one dtype or of others by name."""
    return {
        "residual": normal(n_rows, width, mean=mean, dtype=other_dtypes.get("residual", dtype)),
        "branch": normal(n_rows, width, dtype=other_dtypes.get("branch", dtype), seed=1),
        "weight": normal(width, mean=1.0, dtype=other_dtypes.get("weight", dtype), seed=2),
        "bias": normal(width, dtype=other_dtypes.get("bias", dtype), seed=3),
        "branch_bias": normal(width, mean=2.0, dtype=other_dtypes.get("branch_bias", dtype), seed=6),
    }


def gradients_of(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of the sum, and of its LayerNorm."""
    shape = inputs["residual"].shape
    return [normal(*shape, seed=4), normal(*shape, seed=5)]


def without_branch(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"x": "residual", "weight": "weight", "bias": "bias"}
    return {name: inputs[given] for name, given in names.items()}


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Eager LayerNorm, also where torch has none for the mixture of dtypes."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    return eager.layer_norm(x.to(wide), weight.to(wide), bias.to(wide)).to(x.dtype)


def add_reference(residual, branch, weight, bias, branch_bias=None):
    residual = residual + (branch if branch_bias is None else branch + branch_bias)
    return residual, reference(residual, weight, bias)


def assert_both_no_worse(inputs, gradients=None):
    """Both ops, forward and every gradient."""
    gradients = gradients or gradients_of(inputs)
    n_rows = inputs["residual"].numel() // inputs["residual"].shape[-1]
    summed = dict.fromkeys(("dweight", "dbias", "dbranch_bias"), n_rows)
    alone = without_branch(inputs)
    assert_no_worse(accuracy.compare_op(layer_norm, reference, alone, gradients[1:], summed))
    assert_no_worse(accuracy.compare_op(add_layer_norm, add_reference, inputs, gradients, summed))


@pytest.mark.parametrize(("width", "dtype"), WIDTHS, ids=str)
def test_numbers(width, dtype):
    assert_both_no_worse(inputs_of(2 if width > 2000 else 5, width, dtype))


@pytest.mark.parametrize(("width", "dtype"), WIDTHS, ids=str)
def test_rows_of_equal_numbers(width, dtype):
    # rstd is 1/√eps there: whatever rounding leaves in the mean comes out 316 times as large.
    inputs = inputs_of(2, width, dtype)
    for name in ("residual", "branch"):
        inputs[name] = (3.0 * inputs[name][:, :1]).expand(-1, width)
    inputs["branch_bias"] = inputs["branch_bias"][:1].expand(width)
    assert_both_no_worse(inputs)


@pytest.mark.parametrize("n_programs", [1, 3])
@pytest.mark.parametrize(("n_rows", "width"), [(37, 768), (300, 64), (7, 2100)])
def test_programs_share_the_rows(n_rows, width, n_programs, monkeypatch):
    monkeypatch.setattr(launch, "n_programs", lambda device: n_programs)
    assert_both_no_worse(inputs_of(n_rows, width))


def test_several_programs_per_multiprocessor(monkeypatch):
    monkeypatch.setattr(launch, "n_programs", lambda device: 2)
    inputs = inputs_of(37, 64)
    want = accuracy.outputs_and_gradients(add_layer_norm, inputs, gradients_of(inputs))
    row = launch.lookup("layer_norm", inputs["residual"].device, 4, 64)._replace(block_m=4)
    for programs in (1, 3):
        calls: list[launch.Call] = []
        with launch.Trial(row._replace(programs=programs)):
            got = accuracy.outputs_and_gradients(add_layer_norm, inputs, gradients_of(inputs))
            with launch.DryRun(90, calls.append):
                add_layer_norm(*inputs.values())
        assert calls[0].grid == (2 * programs, 1) and calls[0].options["maxnreg"] == row.max_registers
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_more_partial_sums_than_a_block(monkeypatch):
    few = launch.LaunchConfig("column_sums", 0, launch.ANY, 8, 4, 32, 4, 1)
    monkeypatch.setattr(launch, "n_programs", lambda device: 9)
    with launch.Trial(few):
        assert_both_no_worse(inputs_of(9 * 64, 33))


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Rows of more than 32 columns are wide, and taken in blocks of 64."""
    monkeypatch.setattr(launch, "WIDEST_TILE", 32)
    wide = launch.LaunchConfig("wide_layer_norm", 0, launch.ANY, 8, 1, 64, 4, 1)
    with launch.Trial(wide, wide._replace(op="layer_norm_backward", block_m=4)):
        yield


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize(
    ("width", "dtypes"),
    [
        *((width, {}) for width in (33, 128)),
        (200, {"residual": BF16, "branch": BF16, "branch_bias": BF16}),
        (200, {"branch": BF16, "weight": BF16, "bias": BF16, "branch_bias": BF16}),
    ],
)
def test_wide_rows(width, dtypes, monkeypatch):
    monkeypatch.setattr(launch, "n_programs", lambda device: 5)  # at 200 columns two programs per block of them
    inputs = inputs_of(6, width, **dtypes)
    assert_both_no_worse(inputs)
    total, normed = add_layer_norm(*inputs.values())
    assert torch.equal(layer_norm(total, inputs["weight"], inputs["bias"]), normed)
    first, second = (accuracy.outputs_and_gradients(add_layer_norm, inputs, gradients_of(inputs)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_wide_rows_of_equal_numbers_and_of_any_size(size):
    inputs = inputs_of(3, 100)
    assert_both_no_worse(inputs | {name: size * inputs[name] for name in ("residual", "branch", "branch_bias")})
    equal = {name: inputs[name][:1].expand(3, -1)[:, :1].expand(3, 100) for name in ("residual", "branch")}
    assert_both_no_worse(inputs | equal | {"branch_bias": inputs["branch_bias"][:1].expand(100)})


@pytest.mark.usefixtures("narrow_tiles", "overflow_is_reported")
def test_wide_rows_that_are_far_apart():
    inputs = inputs_of(3, 64, BF16)
    assert_both_no_worse(inputs | {name: far_apart(inputs[name]) for name in ("residual", "branch")})
    assert_both_no_worse(inputs, [far_apart(gradient.to(BF16)) for gradient in gradients_of(inputs)])


MIXED = {
    "a stream in fp32": {"branch": BF16},
    "a branch in fp32": {"residual": BF16},
    "weights in fp32": {"residual": BF16, "branch": BF16, "branch_bias": BF16},
    "branch_bias in fp32": {"residual": BF16, "branch": BF16, "weight": BF16, "bias": BF16},
    "weights in bf16": {"weight": BF16, "bias": BF16},
    "bias in bf16": {"bias": BF16},
    "branch_bias in bf16": {"branch_bias": BF16},
    "fp16 and bf16": {"residual": torch.float16, "branch": BF16},
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_mixed_dtypes(mixed):
    inputs = inputs_of(5, 200, **mixed)
    assert_both_no_worse(inputs)
    stream = (inputs["residual"] + inputs["branch"] + inputs["branch_bias"]).dtype
    assert [out.dtype for out in add_layer_norm(*inputs.values())] == [stream, stream]
    assert layer_norm(*without_branch(inputs).values()).dtype == inputs["residual"].dtype


def assert_no_worse_under_autocast(inputs, dtype, n_rows):
    def ours(*inputs):
        with torch.autocast(DEVICE, dtype):
            return add_layer_norm(*inputs)

    def rounded(*inputs):
        residual, normed = add_reference(*inputs)
        return residual, normed.to(dtype) if normed.dtype == FP32 else normed

    summed = dict.fromkeys(("dweight", "dbias", "dbranch_bias"), n_rows)
    assert_no_worse(accuracy.compare_op(ours, rounded, inputs, gradients_of(inputs), summed))


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_under_autocast(dtype):
    inputs = inputs_of(5, 200, branch=dtype)
    assert_no_worse_under_autocast(inputs, dtype, 5)
    with torch.autocast(DEVICE, dtype):
        residual, normed = add_layer_norm(*inputs.values())
    assert residual.dtype == FP32 and normed.dtype == dtype
    with torch.autocast(DEVICE, dtype):
        assert layer_norm(residual, inputs["weight"], inputs["bias"]).dtype == dtype
        assert layer_norm(residual.double(), inputs["weight"].double(), inputs["bias"]).dtype == torch.float64


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("residual", "branch"), [*((d, d) for d in DTYPES.values()), (FP32, BF16)], ids=str)
@pytest.mark.parametrize("width", [64, 1023])
def test_layer_norm_of_the_sum_has_the_same_bits(width, residual, branch, autocast):
    if (residual, branch, autocast) == (FP32, BF16, False) and DEVICE == "cuda":
        pytest.skip("no network makes this pair, and the compiler lays its rows out in two ways")
    inputs = inputs_of(11, width, residual=residual, branch=branch)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        r, b, weight, bias, branch_bias = inputs.values()
        total, _ = add_layer_norm(r, b, weight, bias)
        assert torch.equal(total, r + b)
        for added in (None, branch_bias):
            total, normed = add_layer_norm(r, b, weight, bias, added)
            assert torch.equal(layer_norm(total, weight, bias), normed)


@pytest.mark.parametrize(("residual", "branch"), [(FP32, FP32), (FP32, BF16), (BF16, BF16)], ids=str)
def test_branch_bias(residual, branch):
    """Added before the sum is rounded; its gradient is that of the branch, summed before that is rounded."""
    inputs = inputs_of(37, 200, residual=residual, branch=branch, branch_bias=branch)
    gradients = gradients_of(inputs)
    with_bias = accuracy.outputs_and_gradients(add_layer_norm, inputs, gradients)
    exact_sum = inputs["residual"].float() + (inputs["branch"].float() + inputs["branch_bias"].float())
    assert torch.equal(with_bias["out0"], exact_sum.to(residual))

    zero = accuracy.outputs_and_gradients(add_layer_norm, inputs | {"branch_bias": normal(200) * 0}, gradients)
    inputs["residual"] = inputs["residual"].float()  # as in the sum with a bias in fp32
    without = {name: x for name, x in inputs.items() if name != "branch_bias"}
    none = accuracy.outputs_and_gradients(add_layer_norm, without, gradients)
    assert all(torch.equal(zero[name].float(), none[name].float()) for name in none if name != "dresidual")
    torch.testing.assert_close(zero["dbranch_bias"], none["dresidual"].sum(0))


def test_branch_bias_has_a_gradient_where_only_the_sum_is_used():
    inputs = inputs_of(5, 48, branch=BF16, branch_bias=BF16)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    dresidual = gradients_of(inputs)[0]
    add_layer_norm(*leaves.values())[0].backward(dresidual)
    assert torch.equal(leaves["branch_bias"].grad, dresidual.sum(0).to(BF16))
    assert leaves["weight"].grad is None


LAYOUTS = """
import re, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import launch
from kernels.layer_norm import _layer_norm_fwd_kernel as kernel

row = launch.lookup("layer_norm", torch.device("cpu"), 4, 768)
constants = dict(
    N_COLS=768, ALIGN=16, COMPUTE_DTYPE=tl.float32, BLOCK_M=row.block_m, BLOCK_N=1024, NUM_STAGES=row.num_stages,
    EPS=1e-5, branch_bias_ptr=None,
)
pointers = {"x": "fp32", "branch": "bf16", "weight": "fp32", "bias": "fp32", "residual": "fp32", "y": "bf16"}
for has_branch in (True, False):
    signature = {f"{name}_ptr": f"*{dtype}" for name, dtype in pointers.items()}
    signature |= {"statistics_ptr": "*fp32"}
    signature |= {name: "i32" for name in ("n_rows", "stride_x", "stride_branch")}
    absent = () if has_branch else ("branch_ptr", "residual_ptr", "stride_branch")
    values = constants | dict.fromkeys(absent)
    signature = {name: "constexpr" if name in values else signature[name] for name in kernel.arg_names}
    by_16 = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in values}
    source = ASTSource(kernel, signature, values, by_16)
    for capability in (80, 90, 100):
        options = {"num_warps": row.num_warps, "maxnreg": row.max_registers}
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        ir = compiled.asm["ttgir"]
        layouts = dict(re.findall(r"(#\\w+) = (#ttg\\.\\w+<.*>)", ir))
        sums = re.findall(r'"tt.reduce".*?\\}\\) : \\(tensor<.*?(#\\w+)>', ir, re.S)
        print(has_branch, *(layouts[name] for name in sums))
"""


def test_both_forwards_sum_a_row_in_the_same_order_on_a_gpu():
    # The interpreter cannot show it: there a row is summed by NumPy, whatever the compiler makes of it.
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAYOUTS]
    done = subprocess.run(command, cwd=ROOT, env=compiling, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    with_branch, alone = (
        [line.split(maxsplit=1)[1] for line in lines if line.startswith(b)] for b in ("True", "False")
    )
    assert len(alone) == 3 and all("blocked" in line for line in alone) and alone == with_branch


VIEWS = {
    "a transposed batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows of a wider matrix": lambda x: torch.cat([x + 1, x, x[..., :1]], -1)[..., x.shape[-1] : -1],
    "at an odd offset": lambda x: torch.cat([x, x], -1).flatten()[3 : 3 + x.numel()].view_as(x),
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row": lambda x: x[:, :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    inputs = {"residual": normal(2, 5, 48, mean=5.0), "branch": normal(2, 5, 48, seed=1)}
    inputs |= {"weight": normal(48, mean=1.0, seed=2), "bias": normal(48, seed=3)}
    dresidual, dy = gradients_of(inputs)
    # One at a time: nobody may take the strides of another.
    assert_both_no_worse(inputs | {"residual": view(inputs["residual"])}, [view(dresidual), dy])
    assert_both_no_worse(inputs | {"branch": view(inputs["branch"])}, [dresidual, view(dy)])


def test_the_compiler_is_told_what_divides_every_stride():
    # What it makes of a wrong answer, a misaligned access, only shows on a GPU.
    for strides, aligned in (
        ((768, 1600), 16),
        ((768, 5000), 8),
        ((768, 1023), 1),
        ((0, 100), 4),
        ((2**30, 2**31 + 2), 2),
    ):
        _, constants = kernel_file._configure("layer_norm", normal(3, 8), *strides, None)
        assert constants["ALIGN"] == aligned


def test_strided_weights():
    inputs = inputs_of(5, 48)
    weights = torch.stack([inputs["weight"], inputs["bias"]], 1)
    assert_both_no_worse(inputs | {"weight": weights[:, 0], "bias": weights[:, 1], "branch_bias": weights[:, 1]})


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["the sum", "its LayerNorm", "both"])
@pytest.mark.parametrize("branch", [FP32, BF16])
def test_gradients_of_a_sum_over_what_is_used(used, branch):
    def gradients(op):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs_of(5, 48, branch=branch).items()}
        outputs = op(*leaves.values())
        sum(outputs[i].sum() * (i + 1) for i in used).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    ours, references = gradients(add_layer_norm), gradients(eager.add_layer_norm)
    for name, want in references.items():
        if want is None:
            assert ours[name] is None
        else:
            torch.testing.assert_close(ours[name], want, rtol=1e-5 if want.dtype == FP32 else 1e-2, atol=1e-5)


def test_the_gradients_of_residual_and_branch_are_two():
    leaves = [x.requires_grad_() for x in inputs_of(5, 48).values()]
    torch.autograd.backward(add_layer_norm(*leaves), gradients_of(inputs_of(5, 48)))
    residual, branch, *_ = leaves
    assert torch.equal(residual.grad, branch.grad)
    residual.grad.zero_()
    assert branch.grad.abs().min() > 0


def test_a_branch_of_another_dtype_gets_the_same_gradient_rounded_once():
    inputs = inputs_of(5, 48, branch=BF16)
    results = accuracy.outputs_and_gradients(add_layer_norm, inputs, gradients_of(inputs))
    assert torch.equal(results["dbranch"], results["dresidual"].bfloat16())


def test_one_row():
    inputs = inputs_of(1, 48)
    assert_both_no_worse(inputs | {name: inputs[name].view(48) for name in ("residual", "branch")})


def test_no_rows():
    inputs = inputs_of(5, 48)
    empty = inputs | {name: inputs[name][:0] for name in ("residual", "branch")}
    for op, given, n_outputs in ((layer_norm, without_branch(empty), 1), (add_layer_norm, empty, 2)):
        results = accuracy.outputs_and_gradients(op, given, [torch.empty(0, 48, device=DEVICE)] * n_outputs)
        assert results["out0"].shape == (0, 48)
        assert not any(results[name].any() for name in ("dweight", "dbias", "dbranch_bias") if name in results)


@pytest.mark.parametrize("widest", [launch.WIDEST_TILE, 4])
def test_gradcheck(widest, monkeypatch):
    monkeypatch.setattr(launch, "n_programs", lambda device: 2)
    monkeypatch.setattr(launch, "WIDEST_TILE", widest)
    inputs = {name: x.requires_grad_() for name, x in inputs_of(2, 5, torch.float64, mean=1.0).items()}
    if widest > 4:
        assert torch.autograd.gradcheck(layer_norm, tuple(without_branch(inputs).values()), fast_mode=True)
    assert torch.autograd.gradcheck(add_layer_norm, tuple(inputs.values()), fast_mode=True)


def test_opcheck():
    ops = torch.ops.tritongpt
    inputs = inputs_of(3, 7, residual=FP32, branch=BF16, weight=FP32)
    x, other, weight, bias, branch_bias = (tensor.requires_grad_() for tensor in inputs.values())
    torch.library.opcheck(ops.layer_norm, (x, weight, bias, BF16))
    torch.library.opcheck(ops.add_layer_norm, (x, other, branch_bias, weight, bias, BF16))
    dy, dresidual = normal(3, 7, dtype=BF16), normal(3, 7, seed=1)
    saved = normal(3, 7, seed=2), normal(2, 3), normal(7)
    for gradient, branch_bias_dtype in ((dresidual, FP32), (None, None)):
        dtypes = FP32, BF16, BF16, branch_bias_dtype
        torch.library.opcheck(ops.layer_norm_backward, (dy, gradient, *saved, *dtypes))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast):
    def two(residual, branch, weight, bias, branch_bias):
        residual, normed = add_layer_norm(residual, branch, weight, bias, branch_bias)
        return residual, normed, layer_norm(residual, weight, bias)

    inputs = inputs_of(5, 48)
    gradients = [*gradients_of(inputs), normal(5, 48, seed=6)]
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        want = accuracy.outputs_and_gradients(two, inputs, gradients)
        compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
        got = accuracy.outputs_and_gradients(compiled, inputs, gradients)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_run_to_run_and_a_second_backward():
    inputs = inputs_of(99, 300)
    first, second = (accuracy.outputs_and_gradients(add_layer_norm, inputs, gradients_of(inputs)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

    leaves = [x.requires_grad_() for x in inputs.values()]
    outputs = add_layer_norm(*leaves)
    once, again = (
        torch.autograd.grad(outputs, leaves, gradients_of(inputs), retain_graph=keep) for keep in (True, False)
    )
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("size", [1e28, 1e30])
def test_rows_whose_variance_overflows(size):
    """It is infinite in fp32, and rstd 0, as in eager: what rounding left in the mean must not make NaN of it."""
    inputs = inputs_of(5, 48)
    assert_both_no_worse(inputs | {"residual": size * inputs["residual"]})
    assert layer_norm(size * inputs["residual"], inputs["weight"], inputs["bias"]).isfinite().all()


@pytest.mark.usefixtures("overflow_is_reported")
def test_rows_that_are_far_apart():
    inputs = inputs_of(3, 64, BF16)
    assert_both_no_worse(inputs | {name: far_apart(inputs[name]) for name in ("residual", "branch")})
    assert_both_no_worse(inputs, [far_apart(gradient.to(BF16)) for gradient in gradients_of(inputs)])


def test_what_is_refused():
    x, weight = normal(2, 8), normal(8)
    for refused in ((x, weight[:4], weight), (x, weight, weight[:4]), (x, weight, x)):
        with pytest.raises(ValueError, match="as wide as a row"):
            layer_norm(*refused)
    with pytest.raises(ValueError, match="branch_bias is as wide as a row"):
        add_layer_norm(x, x, weight, weight, weight[:4])
    with pytest.raises(ValueError, match="fp16 or bf16, and branch_bias is"):
        add_layer_norm(x, x, weight, weight, weight.int())
    with pytest.raises(ValueError, match="differ in shape"):
        add_layer_norm(x, x[:1], weight, weight)


def test_cost_is_what_goes_in_and_comes_out():
    inputs = inputs_of(5, 48, branch=BF16)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autocast(DEVICE, BF16):
        outputs = add_layer_norm(*leaves.values())
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [out.detach() for out in outputs])
    n_bytes = sum(tensor.nbytes for tensor in (*inputs.values(), *outputs)) + 2 * 5 * 4  # mean and rstd
    assert kernel_file.forward_cost(5, 48, 4, 2, 4, 2, 4).bytes == n_bytes
    residual, normed = outputs
    read = residual.nbytes + normed.nbytes + residual.nbytes + inputs["weight"].nbytes + 2 * 5 * 4
    assert kernel_file.backward_cost(5, 48, 4, 2, 4, 2, 4).bytes == read + sum(tensor.nbytes for tensor in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1600])
def test_full_size(width):
    inputs = inputs_of(16384, width, branch=BF16)
    assert_no_worse_under_autocast(inputs, BF16, 16384)
    first, second = (accuracy.outputs_and_gradients(add_layer_norm, inputs, gradients_of(inputs)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
