"""What is kept for the backward pass does not grow."""

import dataclasses

import pytest
import torch

from bench import capture, memory, step
from kernels.ops import EAGER
from model.gpt import GPT, PRESETS
from training import check


@pytest.fixture(scope="module")
def ours():
    return capture.our_ops()


@pytest.mark.parametrize(("level", "limit"), list(enumerate(memory.LIMITS)))
@pytest.mark.parametrize("dtype", memory.DTYPES.values(), ids=memory.DTYPES)
def test_elements_a_token_and_layer(ours, dtype, level, limit):
    elements, n_bytes = memory.saved_per_layer("d12", ours, dtype, recompute=level)
    C = PRESETS["d12"].n_embd
    assert limit - 0.2 < elements / C <= limit
    stream = 2 * C * (4 - dtype.itemsize)  # it stays fp32
    assert n_bytes == pytest.approx(dtype.itemsize * elements + stream, rel=0.02)


def test_eager_keeps_more():
    elements, _ = memory.saved_per_layer("d12", EAGER, torch.float32, sequence_length=256)
    assert elements > 25 * PRESETS["d12"].n_embd


def test_no_tensor_as_large_as_the_logits_is_kept(ours):
    config = dataclasses.replace(PRESETS["d12"], n_layer=1)
    logits = 2 * 256 * config.vocab_size
    assert memory.saved(config, EAGER, torch.bfloat16, (2, 256)).largest >= logits
    found = memory.saved(config, ours, torch.bfloat16, (8, 1024))
    # The gradient of the tied matrix waits for its scale, and does not grow with tokens.
    assert found.largest <= config.vocab_size * config.n_embd < 8 * 1024 * config.vocab_size / 8


@pytest.mark.parametrize("preset", ["d12", "d48"])
def test_the_head_has_an_eighth_of_the_logits_alive(ours, preset):
    peak, logits = memory.head_peak(preset, ours)
    assert logits == 65536 * 50257 * 2
    assert 0 < peak <= logits / 8
    peak, logits = memory.head_peak(preset, EAGER)
    assert peak > logits


@pytest.fixture
def check_peak(ours, monkeypatch):
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
        gpt = GPT(dataclasses.replace(PRESETS["d12"], n_layer=n_layer), ours, init=False)
        with capture.trace() as tracing:
            monkeypatch.setattr(torch.nn.Module, "_apply", apply)
            monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.0)  # a fake tensor has none
            capture.fake_parameters(gpt)
            x, y = (torch.empty(batch_size, 1024, dtype=torch.int64) for _ in range(2))
            assert check.check(gpt, x, y, torch.bfloat16, lambda line: None)
            return tracing.peak_bytes

    return count


def test_the_check_of_every_op_at_64_sequences_fits_80_gb(check_peak, monkeypatch):
    """One layer: what a call holds is freed before the next. Larger slices than its own hold more: fewer are traced."""
    monkeypatch.setattr(check, "_SLICE_BYTES", 16 * check._SLICE_BYTES)
    logits = 64 * 1024 * 50257 * 2
    assert 2 * logits < check_peak(1, 64) < 40e9  # bf16 logits and their gradient are of one call


def test_the_check_of_the_network_at_64_sequences_fits_80_gb(ours, check_peak, monkeypatch):
    """Our kernels take the whole batch, as in training; eager and the truth a sequence, six times as many layers."""
    monkeypatch.setattr(check, "_compare_ops", lambda *args: None)
    whole = step.trace_step(PRESETS["d12"], ours).peak_bytes
    assert max(whole, 6 * check_peak(2, 1)) < 40e9


def test_what_is_counted_is_what_autograd_keeps():
    """One layer by hand: of y = gelu(x·w) autograd keeps x, the product and what gelu keeps of it."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        memory.saved(dataclasses.replace(PRESETS["nano"], n_layer=1), EAGER, torch.float32, (1, 8))
    assert not kept  # the hooks of the count are the inner ones


def test_limits_are_told():
    good = memory.Memory("triton", 0, {"fp32": 16.0}, {"fp32": 64.0}, False, 0.1, 20.0)
    assert memory.violations([good]) == []
    bad = good._replace(per_layer={"fp32": 16.2}, logits_sized=True, head_peak=0.13)
    assert len(memory.violations([bad])) == 3
    assert memory.violations([bad._replace(backend="eager")]) == []
