"""The clock of a real GPU."""

import pytest
import torch

from bench import harness, variants
from bench.ops import BENCHMARKS

pytestmark = pytest.mark.gpu


def test_every_variant_of_an_op_is_timed():
    device = harness.CudaDevice()
    benchmark = next(b for b in BENCHMARKS if b.op == "gelu")
    rows = harness.measure(benchmark, benchmark.shapes[-1], torch.bfloat16, device, seconds=0.2)
    for row in rows:
        assert not row.note or row.note.startswith("host late")
        assert 0 < row.p20 <= row.p50 <= row.p80 < 100
        # Nothing moves its compulsory bytes faster than the memory of the fastest GPU that there is.
        assert row.bytes / (1e-3 * row.p50) < 10e12
    assert device.l2_bytes


def test_every_variant_of_the_step_is_timed(tmp_path):
    device = harness.CudaDevice()
    rows = variants.measure("nano", (8, 128), torch.bfloat16, device, seconds=2.0, chrome_trace=tmp_path / "trace.json")
    steps = {row.variant: row for row in rows if row.op == "step"}
    assert list(steps) == list(variants.VARIANTS)
    assert all(row.p50 > 0 and row.note.startswith("peak") for row in steps.values()), steps
    parts = {row.pass_name: row.p50 for row in rows if (row.op, row.variant) == ("step part", "triton")}
    assert parts["matmul"] > 0 and parts["attention"] > 0 and parts["norm"] > 0
    assert (tmp_path / "trace.json").exists()
