"""LayerNorm as torch has it: any normalized_shape and eps, with or without weight and bias, rows of any width."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import accuracy
from kernels.nn import LayerNorm, layer_norm
from tests.kernels.conftest import DEVICE, assert_no_worse, dtypes, normal

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = {(7,): (3, 5), (1,): (4,), (5, 3): (2, 3), (2, 1, 6): (3,), (4,): (), (768,): (2,)}
"""normalized_shape, and the dimensions before it"""


def assert_as_torch(x, shape, weight=None, bias=None, eps=1e-5, *, dy=None, atol=0.0):
    """Forward and every gradient, by the rule of kernels.accuracy; errors up to atol are never off."""
    inputs = {name: v for name, v in (("input", x), ("weight", weight), ("bias", bias)) if v is not None}

    def of_tensors(function):
        def call(*tensors):
            named = dict(zip(inputs, tensors, strict=True))
            return function(named["input"], shape, named.get("weight"), named.get("bias"), eps)

        return call

    gradients = [normal(*x.shape, seed=5) if dy is None else dy]
    summed = dict.fromkeys(("dweight", "dbias"), x.shape[: -len(shape)].numel())
    found = accuracy.compare_op(of_tensors(layer_norm), of_tensors(F.layer_norm), inputs, gradients, summed)
    assert_no_worse([c._replace(tolerance=max(c.tolerance, atol)) for c in found])


def vectors(shape, dtype=FP32, has_weight=True, has_bias=True):
    """weight and bias, or None"""
    return (
        normal(*shape, mean=1.0, dtype=dtype, seed=1) if has_weight else None,
        normal(*shape, dtype=dtype, seed=2) if has_bias else None,
    )


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    x = normal(*SHAPES[shape], *shape, mean=3.0, dtype=dtype)
    for has_weight, has_bias in ((True, True), (True, False), (False, True), (False, False)):
        assert_as_torch(x, shape, *vectors(shape, dtype, has_weight, has_bias))


@pytest.mark.parametrize("eps", [0, 1e-12, 1e-3, 0.5, 10.0, -0.5])
def test_eps(eps):
    """A negative sum with the variance has no root, here or in torch."""
    for std in (1e-3, 1.0):
        weight, bias = vectors((40,))
        assert_as_torch(normal(3, 40, std=std, mean=2.0), (40,), weight, bias, eps)
    exact = normal(3, 40, dtype=torch.float64)
    torch.testing.assert_close(layer_norm(exact, (40,), eps=eps), F.layer_norm(exact, (40,), eps=eps), equal_nan=True)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-5, 1e5, 1e15, 1e19, 1e28, 1e30])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_rows_of_any_size(size, eps):
    weight, bias = vectors((48,))
    assert_as_torch(size * normal(3, 48, mean=1.0), (48,), weight, bias, eps)


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((8192, FP32), (65536, FP32), (65536, BF16))]


@pytest.mark.parametrize(("width", "dtype"), [(8193, FP32), *SLOW], ids=str)
def test_wide(width, dtype):
    x = normal(2, width, mean=5.0, dtype=dtype)
    weight, bias = vectors((width,), dtype)
    assert_as_torch(x, (width,), weight, bias, eps=0.5)


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat([x + 1, x, x[..., :1]], -1)[..., x.shape[-1] : -1],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "stride 0": lambda x: x[:, :, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    x, dy = normal(3, 2, 4, 6, mean=2.0), normal(3, 2, 4, 6, seed=9)
    for shape in ((6,), (4, 6)):
        weight, bias = vectors(shape)
        assert_as_torch(view(x), shape, weight, bias)
        assert_as_torch(x, shape, weight, bias, dy=view(dy))
    weight, bias = (view(normal(3, 2, 4, 6, seed=seed))[0] for seed in (1, 2))
    assert_as_torch(x, (2, 4, 6), weight, bias)


@pytest.mark.parametrize(("lead", "shape"), [((0,), (5,)), ((2, 0), (3, 4)), ((2,), (0,)), ((0,), (0, 3))], ids=str)
def test_empty(lead, shape):
    x = torch.zeros(*lead, *shape, device=DEVICE).requires_grad_()
    leaves = [x, *(v.requires_grad_() for v in vectors(shape))]
    out = layer_norm(leaves[0], shape, *leaves[1:])
    assert out.shape == x.shape
    for got, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert got.shape == leaf.shape and not got.any()


def test_dtypes_of_their_own_and_autocast():
    x = normal(3, 8, dtype=BF16)
    assert layer_norm(x, (8,), *vectors((8,))).dtype == BF16
    with torch.autocast(DEVICE, BF16):
        for dtype in (FP32, BF16):
            ours, torchs = (f(x.to(dtype), (8,), *vectors((8,), dtype)) for f in (layer_norm, F.layer_norm))
            assert ours.dtype == torchs.dtype


# torch's own cases.


# In a process of its own, since these modules change torch's settings at import. They import a package that nothing
# here needs, for a base class of tests.
CASES = """
import sys, types, unittest, torch
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
from torch.testing._internal import common_methods_invocations as methods, common_modules
torch.manual_seed(42)
modules = common_modules.module_inputs_torch_nn_LayerNorm(None, "cpu", torch.float32, False, True)
samples = [*methods.sample_inputs_layer_norm(None, "cpu", torch.float32, False)]
samples += methods.sample_inputs_native_layer_norm(None, "cpu", torch.float32, False)
errors = [(e.sample_input, e.error_regex) for e in methods.error_inputs_native_layer_norm(None, "cpu")]
torch.save({
    "modules": [(m.constructor_input.args, m.constructor_input.kwargs, *m.forward_input.args) for m in modules],
    "samples": [((s.input, *s.args), s.kwargs) for s in samples],
    "errors": [((s.input, *s.args), regex) for s, regex in errors],
}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def torchs(tmp_path_factory):
    """The inputs of torch's own tests of LayerNorm."""
    path = tmp_path_factory.mktemp("torchs") / "cases.pt"
    done = subprocess.run([sys.executable, "-c", CASES, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(path, map_location=DEVICE)


@pytest.mark.slow
@dtypes
def test_torchs_inputs(torchs, dtype):
    assert len(torchs["modules"]) >= 7
    for args, kwargs, x in torchs["modules"]:
        options = kwargs | {"device": DEVICE, "dtype": dtype}
        ours, theirs = (kind(*args, **options) for kind in (LayerNorm, torch.nn.LayerNorm))
        assert str(ours) == str(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
        assert_as_torch(x.to(dtype), ours.normalized_shape, ours.weight, ours.bias, ours.eps)
        want = layer_norm(x.to(dtype), ours.normalized_shape, ours.weight, ours.bias, ours.eps)
        assert torch.equal(ours(x.to(dtype)), want)
    assert len(torchs["samples"]) >= 26
    for (x, shape, *others), kwargs in torchs["samples"]:
        others = [v.to(dtype) if isinstance(v, torch.Tensor) else v for v in others]
        # Gradients of rows of two numbers cancel almost to nothing; the tolerance is that of torch's own tests.
        assert_as_torch(x.to(dtype), shape, *others, atol=1e-5, **kwargs)


@pytest.mark.slow
def test_torchs_errors(torchs):
    assert len(torchs["errors"]) >= 4
    for args, regex in torchs["errors"]:
        with pytest.raises(RuntimeError, match=regex):
            layer_norm(*args)


def test_gradcheck():
    weight, bias = (v.requires_grad_() for v in vectors((2, 3), torch.float64))
    x = normal(2, 2, 3, dtype=torch.float64).requires_grad_()
    for function, inputs in (
        (lambda x, weight, bias: layer_norm(x, (2, 3), weight, bias, 0.5), (x, weight, bias)),
        (lambda x: layer_norm(x, (2, 3)), (x,)),
    ):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_opcheck():
    x, weight = normal(3, 7).requires_grad_(), normal(7).requires_grad_()
    for vectors_given in ((None, None), (weight, None)):
        torch.library.opcheck(torch.ops.tritongpt.layer_norm, (x, *vectors_given, FP32, 1e-3))


def test_compiled():
    module = LayerNorm((4, 6), bias=False, device=DEVICE)
    x = normal(3, 4, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(x).square().sum(), list(module.parameters())) for f in (module, compiled))
    assert torch.equal(compiled(x), module(x)) and all(map(torch.equal, want, got))


def test_the_examples_of_torchs_documentation():
    for shape, sizes in ((10, (20, 5, 10)), ([5, 10, 10], (20, 5, 10, 10))):
        ours = LayerNorm(shape, device=DEVICE)
        x = normal(*sizes)
        assert ours(x).shape == x.shape
        assert_as_torch(x, ours.normalized_shape, ours.weight, ours.bias)


def test_takes_the_place_of_torchs_module():
    theirs = torch.nn.LayerNorm(6, eps=1e-3, device=DEVICE, dtype=BF16)
    torch.nn.init.normal_(theirs.weight)
    ours = LayerNorm(6, 1e-3, device=DEVICE, dtype=BF16)
    assert isinstance(ours, torch.nn.LayerNorm) and ours.weight.dtype == BF16
    ours.load_state_dict(theirs.state_dict())
    x = normal(3, 6, dtype=BF16)
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    ours.reset_parameters()
    assert (ours.weight == 1).all() and (ours.bias == 0).all()
    assert LayerNorm(6, elementwise_affine=False, device=DEVICE)(x.float()).shape == (3, 6)
    assert not list(LayerNorm((2, 3), elementwise_affine=False).parameters())


def test_what_is_refused():
    x = normal(2, 4)
    with pytest.raises(ValueError, match=r"fp16 or bf16, and input is torch\.int64"):
        layer_norm(x.long(), (4,))
    with pytest.raises(ValueError, match="one device"):
        layer_norm(x, (4,), torch.ones(4, device="meta"))
    with pytest.raises(RuntimeError, match="Given normalized_shape="):
        layer_norm(x, (3,))
    with pytest.raises(RuntimeError, match="Given normalized_shape="):
        layer_norm(x, (5, 2, 4))
