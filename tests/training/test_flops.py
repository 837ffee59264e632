"""FLOPs a token by hand for d12, and the table of peaks."""

import pytest

from model.gpt import PRESETS
from training.flops import flops_per_token, peak_flops


def test_flops_per_token_of_d12():
    without_positions = 124_439_808 - 1024 * 768
    assert flops_per_token(PRESETS["d12"], 1024) == 6 * without_positions + 6 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("gpu", "dtype", "tensorcores", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 0, 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 1, 156),
        ("NVIDIA A100-SXM4-80GB", "float32", 0, 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 0, 989.4),
        ("NVIDIA H200", "float16", 0, 989.4),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 0, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", 0, None),
        ("NVIDIA H100 of the future", "bfloat16", 0, None),
        ("Tesla V100-SXM2-16GB", "bfloat16", 0, None),
        ("Tesla V100-SXM2-16GB", "float32", 1, None),
        ("Tesla V100-SXM2-16GB", "float16", 0, 125),
        ("cpu", "float32", 0, None),
    ],
)
def test_peaks_are_certain_or_unknown(gpu, dtype, tensorcores, teraflops):
    got = peak_flops(gpu, dtype, tensorcores)
    assert got == (None if teraflops is None else pytest.approx(teraflops * 1e12))
