"""Every op's benchmark runs as it is, at a small size and by a clock that counts."""

import pytest
import torch

from bench import __main__ as cli
from bench import baselines, harness
from bench.harness import Shape
from bench.ops import BENCHMARKS
from kernels.ops import Ops
from tests.conftest import DEVICE

SMALL = {"n_rows": 4, "n_cols": 48, "width": 16, "B": 2, "T": 17, "H": 2, "D": 16, "C": 48}


def test_every_op_of_the_table_is_timed():
    assert {b.op for b in BENCHMARKS} == set(Ops._fields)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=[b.op for b in BENCHMARKS])
def test_every_variant_is_right_and_timed(benchmark, device, monkeypatch, capsys):
    monkeypatch.setattr(harness, "ROUNDS", (1, 1))
    monkeypatch.setattr(harness, "WARM_UP", 1)
    monkeypatch.setattr(device, "torch_device", torch.device(DEVICE))
    # What libraries take, at what size, is theirs to say.
    monkeypatch.setattr(baselines, "installed", lambda adapters: {})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    sdpa = ["sdpa-math"]  # the others are CUDA's
    monkeypatch.setattr(baselines, "SDPA", {name: baselines.SDPA[name] for name in sdpa})
    for shape in benchmark.shapes:
        assert set(shape.small) == set(shape.sizes)
        assert all(shape.small[k] <= v for k, v in shape.sizes.items())
    sizes = {name: SMALL[name] for name in benchmark.shapes[0].sizes}
    rows = harness.measure(benchmark, Shape("small", sizes, sizes), torch.bfloat16, device, seconds=0.001)
    assert [row.note for row in rows if row.note] == []
    assert all(row.p50 and row.percent for row in rows)
    expected = {"triton", "eager", "compile", "compile max-autotune", benchmark.ceiling}
    assert {row.variant for row in rows} >= (expected | set(sdpa) if benchmark.op == "attention" else expected)
    passes = {"forward", "backward", "both"} if benchmark.has_gradient else {"forward"}
    assert {row.pass_name for row in rows} == passes
    cli._show(rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
