"""Column sums: right, bitwise identical from call to call, and each in the tensor that it is for."""

import itertools

import pytest
import torch

from kernels import column_sums, launch
from tests.conftest import DEVICE
from tests.kernels.conftest import normal


def sums_of(partials: torch.Tensor) -> torch.Tensor:
    out = torch.full(partials.shape[-1:], torch.nan, device=DEVICE)
    column_sums.add_up(partials, out)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (64, 32), (65, 33), (200, 7), (3, 100), (2, 2100)])
def test_sums(shape):
    partials = normal(*shape)
    out, want = sums_of(partials), partials.double().sum(0)
    assert (out - want).abs().max() <= 4 * shape[0] ** 0.5 * torch.finfo(torch.float32).eps * partials.abs().max()
    assert torch.equal(out, sums_of(partials))


@pytest.mark.parametrize("n_outs", [1, 2, 3])
def test_each_sum_goes_to_its_out(n_outs):
    partials = normal(n_outs, 67, 40)
    alone = [sums_of(plane) for plane in partials]
    for wanted in itertools.product((True, False), repeat=n_outs):
        outs = [torch.full((40,), torch.nan, device=DEVICE) if is_wanted else None for is_wanted in wanted]
        calls: list[launch.Call] = []
        with launch.DryRun(90, calls.append):
            column_sums.add_up(partials, *outs)
        assert [call.grid for call in calls] == [(2, n_outs)] * any(wanted)
        column_sums.add_up(partials, *outs)
        assert all(out is None or torch.equal(out, want) for out, want in zip(outs, alone, strict=True))
