"""The timed code, on a device whose clock counts."""

import contextlib
import gc
import itertools
import weakref
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch

from bench import harness
from bench.harness import measure, percentile, time_in_turns

BF16 = torch.bfloat16
approx = partial(pytest.approx, rel=1e-4)


def by_key(rows):
    return {(row.pass_name, row.variant): row for row in rows}


def test_each_pass_times_its_own_part(device, toy):
    benchmark = toy(kernel=(1.0, 2.0, 2.0), eager=(5.0, 7.0, 2.0))
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    times = {key: row.p50 for key, row in rows.items() if key[1] != "copy"}
    assert times == approx(
        {
            ("forward", "triton"): 1.0,
            ("backward", "triton"): 2.0,
            ("both", "triton"): 3.0,
            ("forward", "eager"): 5.0,
            ("backward", "eager"): 7.0,
            ("both", "eager"): 12.0,
        }
    )


def test_rows_say_what_was_measured_and_where(device, toy):
    benchmark = toy()
    row = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))["forward", "triton"]
    assert (row.op, row.shape, row.dtype, row.gpu, row.driver) == ("toy", "8×16", "bfloat16", "NVIDIA Fake 1", "1.0")
    assert (row.bytes, row.flops, row.torch) == (2 * 8 * 16 * 2, 8 * 16, torch.__version__)
    assert row.commit
    assert (row.p20, row.p50, row.p80) == approx((1.0, 1.0, 1.0))


def test_a_wrong_kernel_is_not_timed(device, toy):
    benchmark = toy(kernel=(1.0, 2.0, 2.1), eager=(5.0, 7.0, 2.0))
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    for pass_name in ("forward", "backward", "both"):
        row = rows[pass_name, "triton"]
        assert (row.p20, row.p50, row.p80, row.percent) == (None,) * 4
        assert row.note.startswith("wrong: out0") and "dx" in row.note
        assert rows[pass_name, "eager"].p50


def test_a_variant_that_fails_is_noted_and_the_others_are_timed(device, toy):
    def refuses(x):
        raise RuntimeError("no such\nbackend")

    def runs_out(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    benchmark = toy(refuses=refuses, greedy=runs_out)
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    assert rows["forward", "refuses"].note == "failed: RuntimeError: no such backend"
    assert rows["forward", "greedy"].note == "out of memory"
    assert rows["forward", "refuses"].p50 is None
    assert rows["forward", "triton"].p50 == approx(1.0)


def test_a_variant_that_fails_only_at_full_size_is_noted(device, toy):
    benchmark = toy(big=lambda x: 2 * x if len(x) == 2 else (_ for _ in ()).throw(ValueError("too large")))
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    assert rows["both", "big"].note == "failed: ValueError: too large"
    assert rows["both", "big"].p50 is None


def test_the_percentage_is_of_a_copy_of_the_same_bytes(device, toy, monkeypatch):
    copy = torch.Tensor.copy_
    copied = []

    def slow_copy(self, other):
        device.pass_time(0.5)
        copied.append(self.numel() * self.element_size())
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    benchmark = toy()
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    assert rows["forward", "copy"].p50 == approx(0.5)
    assert rows["forward", "copy"].percent == approx(100.0)
    assert rows["forward", "triton"].percent == approx(50.0)  # 1 ms for what the copy does in half of one
    assert set(copied) == {
        8 * 16 * 2,
        2 * 8 * 16 * 2,
    }  # half of the bytes of a pass, and of both: a copy moves twice
    assert rows["both", "copy"].bytes == rows["both", "triton"].bytes


def test_the_percentage_is_of_the_flops_of_a_matmul(device, toy, monkeypatch):
    matmul = torch.mm

    def slow(*args, **kwargs):
        device.pass_time(4.0)
        return matmul(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", slow)
    benchmark = toy()._replace(ceiling="matmul")
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    flops_a_ms = rows["forward", "matmul"].flops / 4.0
    assert rows["forward", "triton"].percent == approx(100 * (8 * 16 / 1.0) / flops_a_ms)


def test_bare_work_is_the_ceiling_where_it_is_given(device, toy):
    benchmark = toy(kernel=(4.0, 4.0, 2.0))
    benchmark = benchmark._replace(ceiling="bare", bare=toy(kernel=(1.0, 1.0, 3.0)).kernel)
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    assert rows["both", "bare"].p50 == approx(2.0)
    assert rows["both", "triton"].percent == approx(25.0)


def test_variants_take_turns_after_the_warm_up(device):
    order = []

    def caller(name):
        def call(i):
            order.append((name, i))
            device.pass_time(1.0)
            return device.now - 1.0, device.now

        return call

    times, failures = time_in_turns(device, {name: caller(name) for name in "ab"}, seconds=0.04)
    assert not failures
    warm, timed = order[: 2 * harness.WARM_UP], order[2 * harness.WARM_UP :]
    assert [name for name, _ in warm] == ["a"] * harness.WARM_UP + ["b"] * harness.WARM_UP
    assert timed == [(name, i) for i in range(len(times["a"])) for name in "ab"]
    assert len(times["a"]) == len(times["b"]) == harness.ROUNDS[0]


def test_rounds_follow_the_time_that_there_is(device):
    def call(i):
        device.pass_time(1.0)
        return device.now - 1.0, device.now

    assert len(time_in_turns(device, {"a": call}, seconds=0.1)[0]["a"]) == 50  # 1 ms, and as much to hold the device
    assert len(time_in_turns(device, {"a": call}, seconds=60)[0]["a"]) == harness.ROUNDS[1]


def test_holding_the_device_is_never_timed(device, toy):
    benchmark = toy()
    rows = measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05)
    assert len(device.holds) > 30 and min(device.holds) == harness.HOLD_MS
    assert all(row.p80 < 3.1 for row in rows)  # the longest is 3 ms


def test_the_device_is_held_until_a_slow_host_has_enqueued_the_call(device, toy):
    """The host needs 5 ms for 1 ms of the GPU, and 30 ms for the first call, which compiles."""
    host_ms = itertools.chain([30.0], itertools.repeat(5.0))
    quick = toy().kernel

    def slow(x):
        device.pass_time(0.0, on_host=next(host_ms))
        return quick(x)

    benchmark = toy(slow=slow)
    rows = by_key(measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05))
    assert [rows[pass_name, "slow"].p80 for pass_name in ("forward", "backward", "both")] == approx([1.0, 2.0, 3.0])
    assert not any(row.note for row in rows.values())
    assert max(device.holds) == harness.HOLD_FACTOR * 5.0


def test_a_host_that_is_late_is_noted(device):
    """In every other round after the warm-up the host needs longer than the device is held."""

    def caller(late_ms):
        host_ms = itertools.chain([0.1] * harness.WARM_UP, itertools.cycle([0.1, late_ms]))

        def call(i):
            start = device.mark()
            device.pass_time(0.5)
            device.pass_time(0.5, on_host=next(host_ms))
            return start, device.mark()

        return call

    calls = {"late": caller(9.0), "in time": caller(0.9)}
    times, notes = time_in_turns(device, calls, seconds=0.1)
    n_rounds = len(times["late"])
    assert notes == {"late": f"host late in {n_rounds // 2} of {n_rounds} rounds"}
    assert times["in time"] == approx([1.0] * n_rounds)
    assert max(times["late"]) > 5  # what was timed is the host
    assert not time_in_turns(device, calls, seconds=0.1, hold=False)[1]  # who times the host is told nothing


def test_a_graph_keeps_what_it_reads_and_writes(monkeypatch):
    """Only names of torch.cuda are replaced: a CUDA graph holds addresses, and no tensor."""
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda of: contextlib.nullcontext())
    network = torch.nn.Linear(2, 2)
    alive = weakref.ref(network)
    replay = harness.CudaDevice.capture(cast(Any, None), partial(id, network))
    del network
    gc.collect()
    assert alive()
    del replay
    gc.collect()
    assert not alive()


def test_inputs_rotate_through_more_than_the_cache(device, toy):
    seen = []
    benchmark = toy()
    inputs = benchmark.inputs

    def recorded(**of):
        made = inputs(**of)
        seen.append(made["x"])
        return made

    copies = harness.Copies(benchmark._replace(inputs=recorded), benchmark.shapes[0], BF16, device)
    assert sum(x.numel() * x.element_size() for x in seen) > 2 * device.l2_bytes
    used = []
    call = copies.caller(lambda x: used.append(x.data_ptr()) or 2 * x, "forward")
    for i in range(len(seen)):
        call(i)
    assert used == [x.data_ptr() for x in seen]


def test_percentiles_lie_between_neighbours():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 20) == 2.0
    assert percentile([5.0], 80) == 5.0


def test_bf16_at_the_first_shapes_comes_first(toy):
    one = toy()
    two = one._replace(op="other", shapes=one.shapes * 2, dtypes=(BF16,))
    order = [(b.op, dtype) for b, _, dtype in harness.cases([one, two])]
    assert order[:3] == [("toy", BF16), ("other", BF16), ("other", BF16)]
    assert order[3:] == [("toy", torch.float16), ("toy", torch.float32)]
