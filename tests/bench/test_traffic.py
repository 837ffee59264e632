"""No kernel asks for more bytes than it may, and the counting is honest."""

import pytest
import torch
import triton
import triton.language as tl

from bench import traffic
from bench.traffic import counting
from tests.conftest import needs_interpreter

pytestmark = needs_interpreter


@triton.jit
def _copy_twice_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    x += tl.load(x_ptr + offs, mask=offs < n, other=0.0) + tl.load(x_ptr)
    tl.store(y_ptr + offs, x, mask=offs < n)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, tl.dot(x, x)))


def test_lanes_that_are_masked_off_do_not_count():
    x, y = torch.ones(10), torch.empty(10)
    with counting() as counts:
        _copy_twice_kernel[(3,)](x, y, 10, BLOCK=4)
    assert counts.read == {("_copy_twice_kernel", "x_ptr"): (2 * 10 + 3) * 4}
    assert counts.written == {("_copy_twice_kernel", "y_ptr"): 10 * 4}
    assert counts.programs == {"_copy_twice_kernel": 3}
    assert counts.bytes == (3 * 10 + 3) * 4
    assert torch.equal(y, torch.full((10,), 3.0))


def test_views_of_one_buffer_count_under_the_first():
    x = torch.ones(20)
    with counting() as counts:
        _copy_twice_kernel[(1,)](x[:10], x[10:], 10, BLOCK=16)
    assert counts.written == {("_copy_twice_kernel", "x_ptr"): 40}


def test_products_of_dots():
    x = torch.ones(16, 16)
    with counting() as counts:
        _dot_kernel[(1,)](x, torch.empty(16, 16), BLOCK=16)
    assert counts.products == {"_dot_kernel": 2 * 16**3}


def test_nothing_is_counted_behind_the_block():
    with counting() as counts:
        pass
    _copy_twice_kernel[(1,)](torch.ones(4), torch.empty(4), 4, BLOCK=4)
    assert counts.bytes == 0


@pytest.fixture(scope="module")
def found():
    return traffic.traffic()


def test_no_kernel_asks_for_more_than_it_may(found):
    assert not traffic.violations(found)
    assert {(r.op, r.pass_name) for r in found} >= {
        ("gelu", "forward"),
        ("gelu", "backward"),
        ("layer_norm", "forward"),
        ("layer_norm", "backward"),
        ("add_layer_norm", "forward"),
        ("add_layer_norm", "backward"),
        ("attention", "forward"),
        ("attention", "backward"),
        ("cross_entropy", "forward"),
        ("cross_entropy", "backward"),
        ("linear_cross_entropy", "both"),
        ("embedding", "forward"),
    }


def test_gelu_asks_for_nothing_twice(found):
    assert {r.ratio for r in found if r.op == "gelu"} == {1.0}


def test_cross_entropy_reads_logits_twice_and_writes_them_once(found):
    logits = 3 * traffic.VOCABULARY * 2
    for op in ("cross_entropy", "linear_cross_entropy"):
        rows = [r for r in found if r.op == op]
        assert sum(r.read for r in rows) / logits == pytest.approx(2.0, rel=0.001)
        assert sum(r.written for r in rows) / logits == pytest.approx(1.0, rel=0.001)


def test_more_than_is_allowed_is_told(found):
    row = found[0]._replace(read=10 * found[0].read)
    assert len(traffic.violations([row])) == 1


@pytest.mark.parametrize("has_branch", [False, True])
def test_extrapolated_counts_are_what_a_larger_call_asks_for(has_branch):
    counted = [traffic.count_layer_norm(*of, 768, has_branch) for of in ((32, 2), (64, 2), (64, 4), (200, 7))]
    for pass_name in range(2):
        small, more_rows, more_programs, large = (of[pass_name].bytes for of in counted)
        assert traffic.extrapolate(small, more_rows, more_programs, 200, 7) == large
