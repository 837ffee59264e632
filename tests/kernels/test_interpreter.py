"""The mended interpreter: bfloat16, TF32, dots and masked loads mean there what they mean on a GPU."""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from kernels import interpreter
from kernels.gelu import gelu
from tests.conftest import ROOT, needs_interpreter
from tests.kernels.conftest import DEVICE, normal


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, INPUT_PRECISION: tl.constexpr = "ieee"):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=INPUT_PRECISION))


@triton.jit
def _masked_load_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N // 2))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.int16)


def test_casts_to_bf16_round_to_nearest_even():
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3e38, 1e-40, float("inf"), 0.0, -0.0])
    x = torch.cat([halfway, 100 * normal(120).cpu()]).to(DEVICE)
    y = torch.empty(128, dtype=torch.bfloat16, device=DEVICE)
    _cast_kernel[(1,)](x, y, 128)
    assert torch.equal(bits(y), bits(x.bfloat16()))
    assert y[0] == 1 and y[1] == 1 + 2**-6  # both ties, to the even neighbour


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_from_bf16_are_exact(dtype):
    x = normal(128, dtype=torch.bfloat16)
    y = torch.empty(128, dtype=dtype, device=DEVICE)
    _cast_kernel[(1,)](x, y, 128)
    assert torch.equal(y, x.to(dtype))


def test_dots_of_bf16_multiply_numbers():
    a, b = normal(16, 16, dtype=torch.bfloat16), normal(16, 16, dtype=torch.bfloat16, seed=1)
    c = torch.empty(16, 16, device=DEVICE)
    _dot_kernel[(1,)](a, b, c, 16)
    torch.testing.assert_close(c.cpu(), a.cpu().float() @ b.cpu().float(), rtol=1e-5, atol=1e-5)


def test_dots_give_the_same_bits_when_the_matrix_is_turned_round():
    """Whatever the CPU: OpenBLAS for Haswell and Zen adds a·b and bᵀ·aᵀ in two orders. A GPU has one fma after the
    other, in the order of k, and a fma does not mind which factor comes first."""
    a, b = (30 * normal(64, 64, seed=seed) for seed in (2, 3))
    c, turned = torch.empty(2, 64, 64, device=DEVICE)
    _dot_kernel[(1,)](a, b, c, 64)
    _dot_kernel[(1,)](b.mT.contiguous(), a.mT.contiguous(), turned, 64)
    assert torch.equal(turned.mT, c)


def test_dots_of_tf32_drop_the_last_13_bits():
    """As the tensor cores do: whoever wants them rounded does it before."""
    a, b = normal(16, 16), normal(16, 16, seed=1)
    cut_a, cut_b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    c, of_cut, exact = torch.empty(3, 16, 16, device=DEVICE)
    _dot_kernel[(1,)](a, b, c, 16, "tf32")
    _dot_kernel[(1,)](cut_a, cut_b, of_cut, 16, "ieee")
    _dot_kernel[(1,)](a, b, exact, 16, "ieee")
    torch.testing.assert_close(c, of_cut, rtol=1e-5, atol=1e-5)
    assert (c - exact).abs().max() > 1e-3


@needs_interpreter  # a GPU may give anything for a masked load without other
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_masked_load_without_other_shows(dtype):
    x = normal(16, dtype=dtype)
    y = torch.empty(16, dtype=dtype)
    _masked_load_kernel[(1,)](x, y, 16)
    assert torch.equal(y[:8], x[:8]) and y[8:].isnan().all()


def test_one_process_has_one_way():
    other = "cuda" if triton.knobs.runtime.interpret else "cpu"
    with pytest.raises(RuntimeError, match="in a process of its own"):
        interpreter.choose(other)
    with pytest.raises(ValueError, match="not on mps"):
        interpreter.choose("mps")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_choice_is_said_once_and_only_when_asked_for():
    quiet = "import sys; from kernels.ops import parse; parse('eager', 'cpu'); print('triton' in sys.modules);"
    done = run(f"{quiet} print('loud', file=sys.stderr); parse('triton', 'cpu'); parse('eager,gelu=triton', 'cpu')")
    assert done.returncode == 0 and done.stdout == "False\n"
    first, said = done.stderr.splitlines()
    assert first == "loud" and "interpreter" in said


def test_without_triton_all_but_its_backend_works():
    hidden = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a);"
    )
    asks = "import kernels.ops as o; o.parse('eager', 'cpu').gelu; o.parse('triton', 'cpu')"
    done = run(hidden + asks)
    assert "ImportError: the triton backend needs triton: pip install" in done.stderr


@needs_interpreter
def test_the_language_is_looked_through_once_a_launch(monkeypatch):
    """And not once for each call of a device function; the GELU has one."""
    looked, patch = [], triton.runtime.interpreter._patch_builtin
    monkeypatch.setattr(triton.runtime.interpreter, "_patch_builtin", lambda *args: looked.append(1) or patch(*args))
    gelu(normal(10))
    once = len(looked)
    gelu(normal(10_000))
    assert len(looked) == 2 * once > 0
