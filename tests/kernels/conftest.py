"""What the tests of kernels share: the device, the dtypes, inputs from a seeded generator, and NaN-filled outputs."""

import pytest
import torch
import triton.runtime.interpreter

from kernels import accuracy
from tests.conftest import DEVICE

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0.0, std: float = 1.0):
    """Gaussian numbers that depend on the arguments alone, on the device under test."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return (mean + std * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def far_apart(near: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows 2^30 elements apart. No memory is committed for what lies between."""
    return torch.empty_strided(near.shape, (2**30, 1), dtype=near.dtype, device=DEVICE).copy_(near)


def assert_no_worse(comparisons: list[accuracy.Comparison]) -> None:
    """Fail with every line that is off, and on an empty list."""
    assert comparisons
    off = [f"{c.name}: {c.error:.3e} > {c.tolerance:.3e} (eager {c.eager_error:.3e})" for c in comparisons if not c.ok]
    assert not off, "; ".join(off)


@pytest.fixture
def overflow_is_reported(monkeypatch):
    """An offset that overflows int32 would read whatever is there; the interpreter can report it."""
    if DEVICE == "cpu":
        options = triton.runtime.interpreter.InterpreterOptions(debug=True)
        monkeypatch.setattr(triton.runtime.interpreter.interpreter_builder, "options", options)


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch):
    """What a kernel forgets to write shows: new tensors hold NaN."""

    def filled(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
