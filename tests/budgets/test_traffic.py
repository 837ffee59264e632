"""The bytes that kernels load and store in the interpreter, against the compulsory bytes of their formulas.

Only lanes that the mask lets through count. Caches are not seen: a second read of a row that is still in L2 counts.
tests/kernels/test_attention.py does the same for attention, in matrix products.
"""

import contextlib
from collections import Counter
from unittest import mock

import pytest
import torch

from kernels import cross_entropy, embedding, gelu, launch, layer_norm
from tests.conftest import needs_interpreter

pytestmark = needs_interpreter
VOCABULARY, PADDED = 50257, 50304


@contextlib.contextmanager
def counting():
    """Counts of bytes that kernels read and write in this block."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = Counter(read=0, written=0)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def n_bytes(pointers, mask):
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, pointers, mask, *rest):
        counts["read"] += n_bytes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        counts["written"] += n_bytes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield counts


def count_both(function, *inputs):
    """Counts of forward and backward of an op; all of its outputs get a gradient."""
    leaves = [v.requires_grad_() if v.is_floating_point() else v for v in inputs]
    with counting() as forward:
        out = function(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    gradients = [torch.ones_like(out, memory_format=torch.contiguous_format) for out in outs]
    with counting() as backward:
        torch.autograd.backward(outs, gradients)
    return forward, backward


def show(op, counts, cost):
    asked = counts.total() / cost.bytes
    print(f"\n{op}: {counts['read']:,} bytes read, {counts['written']:,} written, {asked:.4f} of what is compulsory")
    return asked


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_gelu_moves_nothing_twice():
    forward, backward = count_both(gelu.gelu, normal(5000))
    assert show("gelu", forward, gelu.forward_cost(5000, 2)) == 1
    assert show("gelu, backward", backward, gelu.backward_cost(5000, 2)) == 1


@pytest.mark.parametrize(("has_branch", "has_branch_bias"), [(False, False), (True, False), (True, True)])
def test_layer_norm_moves_rows_once_and_weights_once_per_program(has_branch, has_branch_bias, monkeypatch):
    n_rows, n_cols, n_programs = 64, 768, 2
    monkeypatch.setattr(launch, "n_programs", lambda device: n_programs)
    function = layer_norm.add_layer_norm if has_branch else layer_norm.layer_norm
    rows = [normal(n_rows, n_cols) for _ in range(1 + has_branch)]
    forward, backward = count_both(function, *rows, *(normal(n_cols) for _ in range(2 + has_branch_bias)))
    sizes = (n_rows, n_cols, 2, 2, 2, 2 * has_branch, 2 * has_branch_bias)
    show(function.__name__, forward, layer_norm.forward_cost(*sizes))
    show(f"{function.__name__}, backward", backward, layer_norm.backward_cost(*sizes))
    weight = n_cols * 2
    n_vectors = 2 + has_branch_bias
    n_forward = n_programs * launch.lookup("layer_norm", torch.device("cpu"), 2, n_cols).programs
    assert forward.total() - layer_norm.forward_cost(*sizes).bytes == n_vectors * (n_forward - 1) * weight
    # Each program writes sums of dw, db and Σ dr in fp32, which are read to be added up.
    partial_sums = 2 * n_programs * n_vectors * n_cols * 4
    assert backward.total() - layer_norm.backward_cost(*sizes).bytes == (n_programs - 1) * weight + partial_sums


def test_embedding_reads_positions_once_per_block_of_sequences():
    B, T, C = 16, 5, 768
    idx = torch.randint(0, 1000, (B, T), generator=torch.Generator().manual_seed(4))
    with counting() as counts:
        embedding.embedding(idx, normal(1000, C, dtype=torch.float32), normal(T, C, dtype=torch.float32))
    assert show("embedding", counts, embedding.forward_cost(B, T, C, 4)) < 1.07


def test_cross_entropy_reads_logits_twice_and_writes_them_once():
    n_rows = 3
    targets = torch.randint(0, VOCABULARY, (n_rows,), generator=torch.Generator().manual_seed(3))
    forward, backward = count_both(
        lambda logits: cross_entropy.cross_entropy(logits[:, :VOCABULARY], targets), normal(n_rows, PADDED)
    )
    assert 0.99 < show("cross_entropy", forward, cross_entropy.forward_cost(n_rows, VOCABULARY, 2)) < 1.01
    assert 0.99 < show("cross_entropy, backward", backward, cross_entropy.backward_cost(n_rows, VOCABULARY, 2)) < 1.01
    with counting() as head:
        hidden, weight = (normal(n, 16).requires_grad_() for n in (n_rows, VOCABULARY))
        cross_entropy.linear_cross_entropy(hidden, weight, targets)
    logits = n_rows * VOCABULARY * 2
    for counts in (forward + backward, head):
        assert counts["read"] == pytest.approx(2 * logits, rel=0.001)
        assert counts["written"] == pytest.approx(logits, rel=0.001)
