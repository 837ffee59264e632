"""`--check 1` at 64 sequences of d12 fits a GPU of 80 GB."""

import dataclasses

import pytest
import torch

from model.gpt import GPT, PRESETS
from tests.budgets import capture
from training import check


@pytest.fixture
def check_peak(monkeypatch):
    """Counts the most bytes that `--check 1` has alive, for a d12 of so many layers, T = 1024 and bf16."""

    def apply(module, function, recurse=True):
        """`Module._apply`, which swaps fake parameters in place where nothing else refers to them, and fails else."""
        replaced = {}
        for part in module.modules():
            for name, param in part._parameters.items():
                if param is not None:
                    if param not in replaced:
                        replaced[param] = torch.nn.Parameter(function(param.detach()))
                    part._parameters[name] = replaced[param]
        return module

    def count(n_layer, batch_size):
        gpt = GPT(dataclasses.replace(PRESETS["d12"], n_layer=n_layer), capture.our_ops(), init=False)
        with capture.trace() as tracing:
            monkeypatch.setattr(torch.nn.Module, "_apply", apply)
            monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.0)  # a fake tensor has none
            capture.fake_parameters(gpt)
            x, y = (torch.empty(batch_size, 1024, dtype=torch.int64) for _ in range(2))
            assert check.check(gpt, x, y, torch.bfloat16)
            return tracing.peak_bytes

    return count


@pytest.mark.slow
def test_the_check_of_every_op_at_64_sequences_fits_80_gb(check_peak, monkeypatch):
    """One layer: what a call holds is freed before the next. Larger slices than its own hold more: fewer are traced."""
    monkeypatch.setattr(check, "_SLICE_BYTES", 16 * check._SLICE_BYTES)
    logits = 64 * 1024 * 50257 * 2
    assert 2 * logits < check_peak(1, 64) < 40e9  # bf16 logits and their gradient are of one call


def test_the_check_of_the_network_at_64_sequences_fits_80_gb(check_peak, monkeypatch):
    """Eager and the truth take one sequence, of six times as many layers. Our kernels take the whole batch, as in
    training, for which test_counts.py has a limit."""
    monkeypatch.setattr(check, "_compare_ops", lambda *args: None)
    assert 6 * check_peak(2, 1) < 40e9
