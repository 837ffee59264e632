"""GELU: no worse than eager everywhere that floats go, through any strides."""

import pytest
import torch

from kernels import accuracy, eager
from kernels.gelu import gelu
from tests.kernels.conftest import DEVICE, DTYPES, assert_no_worse, dtypes, normal

INPUTS = {
    "normal": lambda: normal(3, 700),  # no multiple of the block
    "one": lambda: normal(1),
    "to ±100": lambda: torch.linspace(-100, 100, 2001),
    "where the tail vanishes": lambda: torch.linspace(-13, -3, 1001),
    "subnormal": lambda: normal(64) * 1e-39,
    "fp16's subnormals": lambda: normal(64) * 1e-7,
    "none": lambda: torch.empty(0, 5),
}


@dtypes
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_numbers(make, dtype):
    x = make().to(DEVICE, dtype)
    dy = normal(*x.shape, dtype=dtype, seed=1)
    assert_no_worse(accuracy.compare_op(gelu, eager.gelu, {"x": x}, [dy]))
    assert gelu(x).dtype == dtype


def test_far_out_nothing_overflows():
    x = torch.tensor([-3e38, -1e20, 1e20, 3e38], device=DEVICE, requires_grad=True)
    y = gelu(x)
    y.sum().backward()
    # exp is 0 or infinite there; a GPU's division may be 2 ulps off 1, and s·(1 − s) by as much off 0.
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.detach(), x.detach().clamp(min=0), rtol=2 * eps, atol=0)
    torch.testing.assert_close(x.grad, (x > 0).float(), rtol=0, atol=1000 * eps)


STRIDED = {
    "transposed": lambda x: x.t(),
    "slice": lambda x: x[:, 1::3],
    "expanded": lambda x: x[:, :1].expand(-1, 9),
    "offset": lambda x: x.flatten()[1:],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_any_strides(view):
    x, dy = view(normal(40, 50)), view(normal(40, 50, seed=1))
    for gradient in (dy, dy.flatten()[0].expand_as(x)):
        assert_no_worse(accuracy.compare_op(gelu, eager.gelu, {"x": x}, [gradient]))


def test_gradcheck():
    assert torch.autograd.gradcheck(gelu, 3 * normal(4, 5, dtype=torch.float64).requires_grad_())


def test_opcheck():
    x = normal(5, 7, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.tritongpt.gelu, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.tritongpt.gelu_backward, (x, x))


@pytest.mark.parametrize("dtype", [DTYPES["fp16"], DTYPES["bf16"]])
def test_under_autocast(dtype):
    x = normal(5, 7)
    with torch.autocast(DEVICE, dtype):
        assert gelu(x).dtype == torch.float32 and gelu(x.to(dtype)).dtype == dtype
