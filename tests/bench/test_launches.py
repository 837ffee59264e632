"""A training step launches no more, and moves no more, than it did."""

import pytest
import torch

from bench import launches, roofline, step
from bench.chips import CHIPS, LAUNCH_SECONDS, occupancy
from bench.ops import BENCHMARKS
from kernels.cost import Cost
from model.gpt import PRESETS


@pytest.fixture(scope="module")
def counted():
    return {name: launches.count("d12", name, ops) for name, ops in launches.backends().items()}


MOST_LAUNCHES = 640
"""of a step of d12 at 64×1024 under bf16 autocast with our kernels; lower it when a step gets by with less"""


def test_launches_of_a_step(counted):
    total = {name: sum(c.launches.values()) for name, c in counted.items()}
    assert total["triton"] <= MOST_LAUNCHES
    assert total["triton"] < total["sdpa + F.gelu"] < total["eager"]


def test_kernels_of_a_step_by_name(counted):
    of = counted["triton"].launches
    assert of["_gelu_fwd_kernel"] == of["_gelu_bwd_kernel"] == 12
    assert of["_layer_norm_fwd_kernel"] == of["_layer_norm_bwd_kernel"] == of["_layer_norm_partials_kernel"] == 25
    assert of["_embedding_fwd_kernel"] == of["_mean_kernel"] == 1
    assert not [name for name in of if "softmax" in name or ("layer_norm" in name and "aten" in name)]
    assert counted["eager"].launches["aten::_softmax"] == 12
    assert counted["sdpa + F.gelu"].launches["aten::_scaled_dot_product_flash_attention_for_cpu"] == 12


def test_half_of_the_bytes_of_the_best_of_torch(counted):
    ours, best = (counted[name].bytes_outside_matmuls for name in ("triton", "sdpa + F.gelu"))
    assert ours <= launches.BYTES_LIMIT * best


def test_parts_add_up(counted):
    for c in counted.values():
        assert sum(launches.by_part(c.launches).values()) == sum(c.launches.values())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", "matmul"),
        ("_linear_cross_entropy_kernel", "loss"),
        ("aten::_log_softmax", "loss"),
        ("aten::_softmax", "attention"),
        ("aten::native_layer_norm_backward", "norm"),
        ("_layer_norm_partials_kernel", "norm"),
        ("aten::tanh_backward", "GELU"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_to_copy", "casts and copies"),
        ("aten::embedding_dense_backward", "embedding"),
        ("aten::sum", "bias gradients"),
        ("aten::add", "other"),
    ],
)
def test_names_belong_to_parts(name, part):
    assert roofline.part_of(name) == part


def test_the_bound_of_an_op():
    gelu = next(b for b in BENCHMARKS if b.op == "gelu")
    forward, backward = roofline.predict_op(gelu, gelu.shapes[0])
    n_bytes = 2 * 65536 * 3072 * 2
    assert (forward.bytes, forward.launches, backward.launches) == (n_bytes, 1, 1)
    for chip, ms in forward.milliseconds.items():
        assert ms == pytest.approx(1e3 * (n_bytes / CHIPS[chip].bandwidth + LAUNCH_SECONDS))
    assert backward.milliseconds["H100"] == pytest.approx(1e3 * (1.5 * n_bytes / 3.352e12 + LAUNCH_SECONDS))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=[b.op for b in BENCHMARKS])
def test_every_op_has_a_bound_forward_and_backward(benchmark):
    ops = roofline.predict_op(benchmark, benchmark.shapes[0])
    assert [op.pass_name for op in ops] == ["forward", "backward"]
    for op in ops:
        assert op.launches >= 1
        assert op.milliseconds["A100"] > op.milliseconds["H100"] >= op.milliseconds["H200"] > 0


@pytest.mark.parametrize("op", ["gelu", "layer_norm", "add_layer_norm", "cross_entropy"])
def test_traced_bytes_are_those_of_the_formula(op):
    """What the launchers hand to the kernels is what the op's formula says that they move."""
    benchmark = next(b for b in BENCHMARKS if b.op == op)
    sizes = benchmark.shapes[0].sizes
    from bench import capture

    with capture.trace() as tracing:
        inputs = benchmark.inputs(dtype=torch.bfloat16, device=torch.device("cpu"), **sizes).values()
        inputs = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]
        out = benchmark.kernel(*inputs)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])
    asked = sum(noted.bytes for noted in tracing.launches)
    cost = sum(benchmark.costs(itemsize=2, **sizes), Cost(0, 0))
    assert asked == pytest.approx(cost.bytes, rel=0.05)


def test_the_step_is_the_sum_of_its_parts():
    tracing = step.trace_step(PRESETS["d12"], launches.backends()["triton"])
    h100, h200 = roofline.predict_step("d12", "triton", tracing, ("H100", "H200"))
    assert h100.seconds == pytest.approx(sum(h100.parts.values()))
    assert h100.launches == h200.launches and h100.bytes == h200.bytes
    assert h200.seconds < h100.seconds
    assert h100.parts["matmul"] == pytest.approx(h200.parts["matmul"], rel=0.05)  # bound by the tensor cores
    assert 0.3 < h100.parts["matmul"] / h100.seconds < 0.9
    rows = roofline.rows_of([], [h100])
    assert rows[0].p50 == pytest.approx(1e3 * h100.seconds) and rows[0].note == "predicted"
    assert sum(row.p50 for row in rows[1:]) == pytest.approx(rows[0].p50)


def test_measured_stands_beside_predicted(tmp_path):
    from bench.results import Row, write

    gelu = next(b for b in BENCHMARKS if b.op == "gelu")
    ops = roofline.predict_op(gelu, gelu.shapes[0])
    row = Row("gelu", "forward", "triton", gelu.shapes[0].name, "bfloat16", 0.3, 0.3, 0.3, gpu=CHIPS["H100"].gpu)
    others = [row.with_(variant="eager"), row.with_(dtype="float32", p50=1.0), row.with_(gpu="NVIDIA Fake 1")]
    write(tmp_path / "h100" / "gelu.csv", [row, *others])
    ((op, pass_name, _, _, bound, ms, times),) = roofline.measured_beside(ops, tmp_path)
    assert (op, pass_name, ms) == ("gelu", "forward", 0.3)
    assert times == pytest.approx(0.3 / bound)


@pytest.mark.parametrize(
    ("registers", "shared", "n_warps", "expected"),
    [
        (32, 0, 4, 1.0),
        (33, 0, 4, 0.75),  # registers come in units of 8 a thread
        (64, 0, 4, 0.5),
        (128, 0, 8, 0.25),
        (255, 0, 4, 0.125),
        (32, 100 * 1024, 4, 0.125),  # two blocks, and the KiB that the system takes of each
        (32, 227 * 1024, 8, 0.125),
        (16, 0, 1, 0.5),  # 32 blocks at most
    ],
)
def test_occupancy_is_that_of_the_calculator(registers, shared, n_warps, expected):
    assert occupancy(CHIPS["H100"], registers, shared, n_warps) == expected


def test_candidates_are_ranked_by_what_they_are_worth():
    traces = {name: step.trace_step(PRESETS["d12"], ops) for name, ops in launches.backends().items()}
    steps = [s for name, tracing in traces.items() for s in roofline.predict_step("d12", name, tracing)]
    ranked = roofline.candidates(steps, traces["triton"])
    assert sorted(name[:3] for name, *_ in ranked) == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)", "(g)"]
    worth = [plain - now + left for _, plain, now, left in ranked]
    assert worth == sorted(worth, reverse=True)
    assert all(0 <= left <= now for _, _, now, left in ranked)
