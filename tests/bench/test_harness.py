"""The timed code, on a device whose clock counts."""

import contextlib
import gc
import itertools
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch

from bench import harness
from bench.harness import measure, time_in_turns

BF16 = torch.bfloat16
approx = partial(pytest.approx, rel=1e-4)


def measured(device, benchmark):
    """Rows of a toy benchmark by pass and variant."""
    rows = measure(benchmark, benchmark.shapes[0], BF16, device, seconds=0.05)
    return {(row.pass_name, row.variant): row for row in rows}


def test_each_pass_times_its_own_part(device, toy):
    rows = measured(device, toy(kernel=(1.0, 2.0, 2.0), eager=(5.0, 7.0, 2.0)))
    passes = ("forward", "backward", "both")
    assert [rows[pass_name, "triton"].p50 for pass_name in passes] == approx([1.0, 2.0, 3.0])
    assert [rows[pass_name, "eager"].p50 for pass_name in passes] == approx([5.0, 7.0, 12.0])
    row = rows["forward", "triton"]
    assert (row.op, row.shape, row.dtype, row.gpu, row.driver) == ("toy", "8×16", "bfloat16", "NVIDIA Fake 1", "1.0")
    assert (row.bytes, row.flops, row.torch) == (2 * 8 * 16 * 2, 8 * 16, torch.__version__)
    assert row.commit and (row.p20, row.p80) == approx((1.0, 1.0))


def test_what_is_wrong_or_fails_is_noted_and_the_others_are_timed(device, toy):
    def raises(error, at_most_rows=0):
        def variant(x):
            if len(x) > at_most_rows:
                raise error
            return 2 * x

        return variant

    benchmark = toy(
        kernel=(1.0, 2.0, 2.1),
        eager=(5.0, 7.0, 2.0),
        refuses=raises(RuntimeError("no such\nbackend")),
        greedy=raises(torch.OutOfMemoryError("CUDA out of memory")),
        big=raises(ValueError("too large"), at_most_rows=2),
    )
    rows = measured(device, benchmark)
    for pass_name in ("forward", "backward", "both"):
        wrong = rows[pass_name, "triton"]
        assert (wrong.p20, wrong.p50, wrong.p80, wrong.percent) == (None,) * 4
        assert wrong.note.startswith("wrong: out0") and "dx" in wrong.note
        assert rows[pass_name, "eager"].p50 and not rows[pass_name, "eager"].note
        notes = [rows[pass_name, name].note for name in ("refuses", "greedy", "big")]
        assert notes == ["failed: RuntimeError: no such backend", "out of memory", "failed: ValueError: too large"]
        assert rows[pass_name, "refuses"].p50 is rows[pass_name, "big"].p50 is None


def test_the_percentage_is_of_a_ceiling_that_is_timed_in_the_same_run(device, toy, monkeypatch):
    copied = []

    def slowly(milliseconds, function):
        def call(*args, **kwargs):
            device.pass_time(milliseconds)
            copied.append(args[0].numel() * args[0].element_size())
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.Tensor, "copy_", slowly(0.5, torch.Tensor.copy_))
    monkeypatch.setattr(torch, "mm", slowly(4.0, torch.mm))
    rows = measured(device, toy())
    assert (rows["forward", "copy"].p50, rows["forward", "copy"].percent) == approx((0.5, 100.0))
    assert rows["forward", "triton"].percent == approx(50.0)  # 1 ms for what the copy does in half of one
    # Half of the bytes of a pass, and of both: a copy moves twice.
    assert set(copied) == {8 * 16 * 2, 2 * 8 * 16 * 2}
    assert rows["both", "copy"].bytes == rows["both", "triton"].bytes

    rows = measured(device, toy()._replace(ceiling="matmul"))
    flops_per_ms = rows["forward", "matmul"].flops / 4.0
    assert rows["forward", "triton"].percent == approx(100 * (8 * 16 / 1.0) / flops_per_ms)

    bare = toy(kernel=(1.0, 1.0, 3.0)).kernel
    rows = measured(device, toy(kernel=(4.0, 4.0, 2.0))._replace(ceiling="bare", bare=bare))
    assert (rows["both", "bare"].p50, rows["both", "triton"].percent) == approx((2.0, 25.0))


def test_variants_take_turns_after_the_warm_up_as_often_as_time_allows(device):
    order = []

    def caller(name):
        def call(i):
            order.append((name, i))
            device.pass_time(1.0)
            return device.now - 1.0, device.now

        return call

    times, notes = time_in_turns(device, {name: caller(name) for name in "ab"}, seconds=0.04)
    warm, timed = order[: 2 * harness.WARM_UP], order[2 * harness.WARM_UP :]
    assert [name for name, _ in warm] == ["a"] * harness.WARM_UP + ["b"] * harness.WARM_UP
    assert timed == [(name, i) for i in range(harness.ROUNDS[0]) for name in "ab"]
    assert len(times["a"]) == len(times["b"]) == harness.ROUNDS[0] and not notes
    for seconds, n_rounds in ((0.1, 50), (60, harness.ROUNDS[1])):  # 1 ms, and as much to hold the device
        assert len(time_in_turns(device, {"a": caller("a")}, seconds)[0]["a"]) == n_rounds


def test_the_device_is_held_until_a_slow_host_has_enqueued_the_call(device, toy):
    """The host needs 5 ms for 1 ms of the GPU, and 30 ms for the first call, which compiles."""
    host_ms = itertools.chain([30.0], itertools.repeat(5.0))
    quick = toy().kernel

    def slow(x):
        device.pass_time(0.0, on_host=next(host_ms))
        return quick(x)

    rows = measured(device, toy(slow=slow))
    assert [rows[pass_name, "slow"].p80 for pass_name in ("forward", "backward", "both")] == approx([1.0, 2.0, 3.0])
    assert not any(row.note for row in rows.values())
    assert (min(device.holds), max(device.holds)) == (harness.HOLD_MS, harness.HOLD_FACTOR * 5.0)


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
        monkeypatch.setattr(torch.cuda, name, lambda *of, **how: contextlib.nullcontext())
    network = torch.nn.Linear(2, 2)
    alive = weakref.ref(network)
    replay = harness.CudaDevice.capture(cast(Any, SimpleNamespace(torch_device=None)), partial(id, network))
    del network
    gc.collect()
    assert alive()
    del replay
    gc.collect()
    assert not alive()


def test_inputs_rotate_through_more_than_the_cache(device, toy):
    copies = harness.Copies(toy(), toy().shapes[0], BF16, device)
    addresses = [x.data_ptr() for (x,) in copies.inputs]
    assert len(set(addresses)) * 8 * 16 * 2 > 2 * device.l2_bytes
    used = []
    call = copies.caller(lambda x: used.append(x.data_ptr()) or 2 * x, "forward")
    for i in range(len(addresses)):
        call(i)
    assert used == addresses


def test_bf16_at_the_first_shapes_comes_first(toy):
    one = toy()
    two = one._replace(op="other", shapes=one.shapes * 2, dtypes=(BF16,))
    order = [(b.op, dtype) for b, _, dtype in harness.cases([one, two])]
    assert order[:3] == [("toy", BF16), ("other", BF16), ("other", BF16)]
    assert order[3:] == [("toy", torch.float16), ("toy", torch.float32)]
