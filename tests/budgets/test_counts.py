"""A training step launches no more, moves no more and saves no more than it did."""

import dataclasses

import pytest
import torch

from bench import variants
from bench.results import OURS
from kernels.ops import EAGER
from model.gpt import PRESETS
from tests.budgets import capture, step
from tests.conftest import ROOT
from training import memory

MOST_LAUNCHES = 490
"""of a step of d12 at 64×1024 under bf16 autocast with our kernels; lower it when a step gets by with less"""
MOST_BYTES = 0.35
"""outside matmuls, of those of the strongest eager step: FlashAttention, and GELU in one kernel"""
MOST_SAVED = (16.1, 12.1, 10.1)
"""elements per token and layer, in units of C, by level of recomputation"""


def test_launches(steps):
    print(f"\n{step.launches_table(steps)}")
    total = {name: sum(counted.launches.values()) for name, counted in steps.items()}
    assert total[OURS] <= MOST_LAUNCHES
    assert total[OURS] < total["sdpa + F.gelu"] < total["sdpa"] < total["eager"]
    assert {name: sum(counted.by_part.values()) for name, counted in steps.items()} == total


def test_kernels_by_name(steps):
    of = steps[OURS].launches
    assert of["_gelu_fwd_kernel"] == of["_gelu_bwd_dbias_kernel"] == 12
    assert of["_column_sums_kernel"] == 3 * 12 + 25  # dh of GELU; dq; dk and dv; the sums of each LayerNorm
    assert of["aten::sum"] == 1  # the position embedding's gradient: no bias has a pass of its own
    assert of["_layer_norm_fwd_kernel"] == of["_layer_norm_bwd_kernel"] == 25
    assert of["_embedding_fwd_kernel"] == of["_mean_kernel"] == 1
    assert not [name for name in of if "softmax" in name or ("layer_norm" in name and "aten" in name)]
    assert steps["eager"].launches["aten::_softmax"] == 12
    assert steps["sdpa"].launches["aten::_scaled_dot_product_flash_attention_for_cpu"] == 12
    assert steps["sdpa + F.gelu"].launches["aten::gelu"] == 12


def test_bytes_outside_matmuls(steps):
    assert steps[OURS].bytes_outside_matmuls <= MOST_BYTES * steps["sdpa + F.gelu"].bytes_outside_matmuls


def test_a_residual_stream_in_16_bits_halves_what_the_norms_move(steps):
    tracing = step.trace_step(PRESETS[step.PRESET], capture.our_ops(), residual_dtype=torch.bfloat16)
    outside = sum(event.bytes for event in tracing.events if not event.matmul)
    print(f"\n--residual_dtype bfloat16: {outside / 1e9:.1f} GB outside matmuls, {tracing.peak_bytes / 1e9:.1f} alive")
    assert outside <= 0.3 * steps["sdpa + F.gelu"].bytes_outside_matmuls
    assert tracing.peak_bytes < 0.9 * steps[OURS].peak_bytes


def test_what_is_alive_fits_80_gb(steps):
    """A tenth is for the driver and for fragments. Ours fits at the larger of the batch sizes that bench times; every
    variant fits at the smaller one, and eager, the largest, not at twice that. Of what is alive, weights, gradients,
    moments and casts, at most 20 bytes per parameter, do not grow with the batch."""
    large, small = variants.BATCH_SIZES
    peak, fixed = steps["eager"].peak_bytes, 20 * PRESETS[step.PRESET].num_params()
    assert large == step.BATCH_SIZE and peak == max(counted.peak_bytes for counted in steps.values())
    assert peak * small / large + fixed < 72e9 < peak * 2 * small / large
    assert steps[OURS].peak_bytes < 40e9


def test_memory_is_what_the_default_batch_is_chosen_by(steps):
    config = PRESETS[step.PRESET]
    for name, ops in step.backends().items():
        if name != "sdpa + F.gelu":  # no backend of train.py
            size = step.BATCH_SIZE, step.SEQUENCE_LENGTH
            formula = memory.training_bytes(config, ops, *size, "bfloat16")
            assert formula == pytest.approx(steps[name].peak_bytes, rel=0.04), name


def test_memory_in_readme_is_what_is_counted(steps):
    """d12 at the largest batch is counted here, all other cells by the formula, which is tested above."""
    readme = (ROOT / "README.md").read_text()
    lines = (
        readme.partition("<!-- written by python -m tests.budgets memory: begin -->")[2].split("\n\n")[1].splitlines()
    )
    counted = {}
    for line in lines[2:]:
        preset, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        counted[preset] = [float(cell) for cell in cells[: len(step.BATCH_SIZES)]]
    assert "\n".join(lines) == step.memory_table(counted)
    for preset, gigabytes in counted.items():
        formula = [
            memory.training_bytes(PRESETS[preset], capture.our_ops(), B, step.SEQUENCE_LENGTH, "bfloat16") / 1e9
            for B in step.BATCH_SIZES
        ]
        assert formula == pytest.approx(gigabytes, rel=0.04)
    assert counted[step.PRESET][-1] == pytest.approx(steps[OURS].peak_bytes / 1e9, rel=0.01)


def test_the_table_of_readme_is_what_is_counted(steps):
    table = step.summary(steps, markdown=True)
    print(f"\n{step.TITLE}\n{table}")
    assert table in (ROOT / "README.md").read_text(), "README.md shows other numbers; run python -m tests.budgets"


@pytest.mark.parametrize(("level", "limit"), list(enumerate(MOST_SAVED)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations(dtype, level, limit):
    elements, n_bytes = step.saved_per_layer(capture.our_ops(), dtype, level)
    assert limit - 0.2 < elements <= limit
    residual_stream = 2 * (4 - dtype.itemsize)  # it stays fp32
    print(f"\nsaved, {dtype}, --recompute {level}: {elements:.2f}·C elements, {n_bytes:.2f}·C bytes")
    assert n_bytes == pytest.approx(dtype.itemsize * elements + residual_stream, rel=0.02)


def test_no_tensor_as_large_as_the_logits_is_saved():
    config = dataclasses.replace(PRESETS["d12"], n_layer=1)
    assert step.saved(config, EAGER, torch.bfloat16, (2, 256)).largest >= 2 * 256 * config.vocab_size
    found = step.saved(config, capture.our_ops(), torch.bfloat16, (8, 1024))
    # The gradient of the tied matrix waits for its scale, and does not grow with tokens.
    assert found.largest <= config.vocab_size * config.n_embd < 8 * 1024 * config.vocab_size / 8


def test_the_head_has_an_eighth_of_the_logits_alive():
    assert 0 < step.head_peak(capture.our_ops()) <= 1 / 8
    assert step.head_peak(EAGER) > 1
