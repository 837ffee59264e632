"""The tied head in chunks: no worse than eager, no more memory than it may have, and no work that nobody asked for."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kernels import accuracy, cross_entropy, eager
from kernels.cross_entropy import linear_cross_entropy
from tests.conftest import needs_interpreter
from tests.kernels.conftest import DEVICE, DTYPES, assert_no_worse, normal
from tests.kernels.test_cross_entropy import here_and_there, ids, reference

OPS = torch.ops.tritongpt
half_dtypes = pytest.mark.parametrize("dtype", [DTYPES["fp16"], DTYPES["bf16"]], ids=["fp16", "bf16"])
ONE = torch.tensor(1.0, device=DEVICE)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda n_rows, *sizes: min(4, n_rows))


def linear_reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eager as under autocast: matmuls in the dtype of hidden, loss in fp32."""
    return reference(F.linear(hidden, weight.to(hidden.dtype)), targets)


def inputs(n_rows: int, n_cols: int, width: int, dtype: torch.dtype = torch.float32, **kwargs) -> dict:
    return {
        "hidden": normal(n_rows, width, dtype=dtype, **kwargs),
        "weight": normal(n_cols, width, dtype=dtype, seed=1),
        "targets": ids(n_rows, below=n_cols),
    }


def watch_matmuls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of their results, as they come."""
    matmul, shapes = cross_entropy._matmul, []

    def watched(out, a, b, beta=0):
        shapes.append(tuple(out.shape))
        matmul(out, a, b, beta)

    monkeypatch.setattr(cross_entropy, "_matmul", watched)
    return shapes


def ignoring(given: dict, targets) -> dict:
    return given | {"targets": targets(given["targets"])}


CASES = {
    "rows that no chunk divides": lambda dtype: inputs(11, 61, 16, dtype),
    "the vocabulary": lambda dtype: inputs(3, 50257, 8, dtype),
    "confident": lambda dtype: inputs(11, 61, 16, dtype, std=30.0),
    "some ignored": lambda dtype: ignoring(inputs(14, 61, 16, dtype), here_and_there),
    "a chunk ignored": lambda dtype: ignoring(inputs(10, 61, 16, dtype), lambda t: t.index_fill(0, t[:0] + 4, -1)),
    "one row": lambda dtype: inputs(1, 61, 16, dtype),
    "one class": lambda dtype: inputs(5, 1, 16, dtype),
    "no rows": lambda dtype: inputs(0, 61, 16, dtype),
}
NARROW = ("rows that no chunk divides", "the vocabulary", "confident", "some ignored")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, DTYPES["fp32"]) for name in CASES),
        *((name, dtype) for name in NARROW for dtype in (DTYPES["fp16"], DTYPES["bf16"])),
    ],
    ids=str,
)
def test_numbers(name, dtype):
    given = CASES[name](dtype)
    three = torch.tensor(3.0, device=DEVICE)
    comparisons = accuracy.compare_op(
        linear_cross_entropy, linear_reference, given, [three], {"dweight": len(given["targets"])}
    )
    assert_no_worse(comparisons)
    assert linear_cross_entropy(*given.values()).dtype == torch.float32


@half_dtypes
def test_numbers_under_autocast(dtype):
    """Master weights in fp32, and a hidden state that is or is not cast already."""

    def under_autocast(function):
        def call(*args):
            with torch.autocast(DEVICE, dtype):
                return function(*args)

        return call

    given = inputs(11, 61, 16)
    for hidden in (given["hidden"], given["hidden"].to(dtype)):
        comparisons = accuracy.compare_op(
            under_autocast(linear_cross_entropy),
            under_autocast(linear_reference),
            given | {"hidden": hidden},
            [ONE],
            {"dweight": 11},
        )
        assert_no_worse(comparisons)
        results = accuracy.outputs_and_gradients(
            under_autocast(linear_cross_entropy), given | {"hidden": hidden}, [ONE]
        )
        assert {name: value.dtype for name, value in results.items()} == {
            "out0": torch.float32,
            "dhidden": hidden.dtype,
            "dweight": torch.float32,
        }


def test_fp64_stays_fp64_under_autocast():
    with torch.autocast(DEVICE, torch.bfloat16):
        assert linear_cross_entropy(*inputs(5, 61, 16, torch.float64).values()).dtype == torch.float64


@half_dtypes
def test_dweight_is_summed_in_fp32_and_never_rounded(dtype, monkeypatch):
    """It is what fp64 makes of the very matrices that were multiplied, to fp32's precision."""
    exact = torch.zeros(61, 16, dtype=torch.float64, device=DEVICE)
    matmul, chunks = cross_entropy._matmul, []

    def watched(out, a, b, beta=0):
        if out.shape == exact.shape:
            chunks.append(a.shape)
            exact.add_(a.double() @ b.double())
        matmul(out, a, b, beta)

    monkeypatch.setattr(cross_entropy, "_matmul", watched)
    given = inputs(30, 61, 16)
    with torch.autocast(DEVICE, dtype):
        dweight = accuracy.outputs_and_gradients(linear_cross_entropy, given, [ONE])["dweight"]
    assert len(chunks) == 8
    exact /= 30 * 2**15
    torch.testing.assert_close(dweight.double(), exact, rtol=0, atol=30 * 2**-24 * exact.abs().max().item())


def test_small_gradients_survive_fp16():
    """With a GradScaler's factor. Each probability but the target's is about 1e-8, which fp16 does not have; as rows of
    weight have something in common, all of them together count for as much as the target's 1 − p."""
    hidden = torch.zeros(4, 16, device=DEVICE)
    hidden[:, 0] = 4.0
    weight = normal(2048, 16, seed=1, mean=1.0)
    weight[:, 0] = torch.linspace(-0.1, 0.1, 2048)
    weight[7, 0] = 4.5
    given = {"hidden": hidden.half(), "weight": weight.half(), "targets": torch.full((4,), 7, device=DEVICE)}
    factor = torch.tensor(2.0**16, device=DEVICE)
    comparisons = accuracy.compare_op(linear_cross_entropy, linear_reference, given, [factor], {"dweight": 4})
    assert_no_worse(comparisons)
    results = accuracy.outputs_and_gradients(linear_cross_entropy, given, [factor])
    assert all(results[c.name].abs().max() > 2 * c.tolerance for c in comparisons), "zeros would have passed"


def test_sequences_and_strides():
    hidden, targets = normal(16, 5, 3).permute(2, 1, 0), ids(5, 3, below=61).t()
    weight = normal(16, 61, seed=1).t()
    comparisons = accuracy.compare_op(
        lambda h, w, t: linear_cross_entropy(h, w, t),
        lambda h, w, t: linear_reference(h, w, t.contiguous()),
        {"hidden": hidden, "weight": weight, "targets": targets},
        [ONE],
        {"dweight": 15},
    )
    assert_no_worse(comparisons)


@needs_interpreter  # on a GPU it is an assertion on the device, after which the process is of no more use
@pytest.mark.parametrize("target", [61, 122, -5])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_target_out_of_range(target, needs_grad):
    given = inputs(5, 61, 16)
    given["targets"][3] = target
    given["hidden"].requires_grad_(needs_grad)
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(*given.values())


def test_where_nothing_counts():
    given = ignoring(inputs(5, 61, 16), lambda targets: targets - targets - 1)
    results = accuracy.outputs_and_gradients(linear_cross_entropy, given, [ONE])
    assert results["out0"].isnan() and not results["dhidden"].any() and not results["dweight"].any()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda given: {"targets": given["targets"][1:]},
        lambda given: {"weight": given["weight"][:, 1:]},
        lambda given: {"weight": given["weight"].bfloat16()},
    ],
    ids=["targets", "weight", "dtype"],
)
def test_what_does_not_fit(break_it):
    given = inputs(5, 61, 16)
    with pytest.raises(ValueError, match=r"are not \(\.\.\., C\)|must be the same"):
        linear_cross_entropy(*(given | break_it(given)).values())


def test_gradients_that_are_scaled_expanded_and_summed():
    given = inputs(11, 61, 16)
    hidden, weight = (given[name].requires_grad_() for name in ("hidden", "weight"))
    want = torch.autograd.grad(eager.linear_cross_entropy(*given.values()), (hidden, weight))
    loss = linear_cross_entropy(*given.values())
    for _ in range(2):
        (3 * loss).backward(retain_graph=True)
    factors = torch.tensor([1.0, 3.0], device=DEVICE)
    (linear_cross_entropy(*given.values()).expand(2) * factors).sum().backward()
    torch.testing.assert_close(hidden.grad, 10 * want[0])
    torch.testing.assert_close(weight.grad, 10 * want[1])


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("needs_dweight", [True, False])
@pytest.mark.parametrize("needs_dhidden", [True, False])
def test_nothing_is_multiplied_for_nobody(needs_dhidden, needs_dweight, enabled, monkeypatch):
    given = inputs(11, 61, 16)
    hidden, weight = given["hidden"].requires_grad_(needs_dhidden), given["weight"].requires_grad_(needs_dweight)
    want = {
        name: torch.autograd.grad(eager.linear_cross_entropy(*given.values()), given[name])[0]
        for name in ("hidden", "weight")
        if given[name].requires_grad
    }
    shapes = watch_matmuls(monkeypatch)
    with torch.set_grad_enabled(enabled):
        loss = linear_cross_entropy(hidden, weight, given["targets"])
    n_chunks = 3
    assert shapes.count((4, 61)) == n_chunks - 1 and shapes.count((3, 61)) == 1
    assert len(shapes) == n_chunks * (1 + enabled * (needs_dhidden + needs_dweight))
    assert loss.requires_grad == (enabled and bool(want))
    if loss.requires_grad:
        loss.backward()
        for name in want:
            torch.testing.assert_close(given[name].grad, want[name])


def test_gradcheck():
    targets = torch.tensor([1, -1, 0, 2, 2], device=DEVICE)
    hidden, weight = (normal(n, 2, dtype=torch.float64).requires_grad_() for n in (5, 3))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight), fast_mode=True)


def test_opcheck():
    dtype = DTYPES["bf16"]
    hidden, weight, targets = inputs(6, 9, 4, dtype).values()
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        leaves = (tensor.clone().requires_grad_(need) for tensor, need in zip((hidden, weight), needs, strict=True))
        torch.library.opcheck(OPS.linear_cross_entropy, (*leaves, targets, *needs))
    saved = OPS.linear_cross_entropy(hidden, weight, targets, True, True)[1:]
    torch.library.opcheck(OPS.linear_cross_entropy_backward, (ONE, *saved, dtype, torch.float32))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_as_one_graph(autocast):
    given = inputs(6, 61, 16)

    def loss(hidden, weight, targets):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(2 * hidden, weight, targets)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (accuracy.outputs_and_gradients(function, given, [ONE]) for function in (compiled, loss))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_compiled_nothing_is_multiplied_for_nobody(monkeypatch):
    given = inputs(4, 61, 16)
    given["weight"].requires_grad_()
    shapes = watch_matmuls(monkeypatch)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(*given.values())
    assert shapes == [(4, 61)]
    shapes.clear()
    compiled(*given.values()).backward()
    assert shapes == [(4, 61), (61, 16)] and given["weight"].grad is not None


def test_run_to_run():
    given = inputs(11, 61, 16)
    first, second = (accuracy.outputs_and_gradients(linear_cross_entropy, given, [ONE]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_of_a_chunk(monkeypatch):
    monkeypatch.undo()
    V = 50257
    for width in (768, 1024, 1280, 1600):
        for n_rows in (1, 100, 1000, 4096, 32768, 65536, 262144):
            beside = 2 * V * width + 4 * n_rows
            rows = cross_entropy.chunk_rows(n_rows, V, width, 2, beside)
            n_bytes = rows * 50304 * 2
            assert rows == n_rows <= 128 or rows % 128 == 0
            assert rows < n_rows or n_rows <= 128
            assert n_bytes <= 512 * 2**20
            assert rows >= min(width, n_rows // 2) // 128 * 128
            assert n_bytes + beside <= n_rows * V * 2 / 8 or rows <= max(width, 128)
    assert cross_entropy.chunk_rows(65536, V, 768, 2, 0) == 5248


def peak_bytes(call: Callable[[], None]) -> int:
    """Most memory alive at a time during a call, beyond what was there before."""
    if DEVICE == "cuda":
        for dtype in (torch.float32, torch.bfloat16):  # cuBLAS allocates its workspace once, at the first matmul
            torch.ones(16, 16, dtype=dtype, device=DEVICE).mm(torch.ones(16, 16, dtype=dtype, device=DEVICE))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    alive = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the sum of losses that nobody wrote
@pytest.mark.parametrize("width", [8, 64])
def test_memory(width, monkeypatch):
    """At most an eighth of the logits beside the gradients; whoever makes the logits is far from it."""
    monkeypatch.undo()
    monkeypatch.setattr(cross_entropy, "_launch", lambda *args, **kwargs: None)  # kernels do not allocate
    given = inputs(3000, 5001, width)
    hidden, weight = (given[name].requires_grad_() for name in ("hidden", "weight"))
    logits, gradients = 4 * 3000 * 5001, 4 * (3000 + 5001) * width
    peak = peak_bytes(lambda: linear_cross_entropy(*given.values()).backward())
    assert logits / 16 < peak - gradients <= logits / 8
    hidden.grad = weight.grad = None
    assert peak_bytes(lambda: eager.linear_cross_entropy(*given.values()).backward()) - gradients > logits


def test_backward_makes_the_gradients_and_nothing_else(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_launch", lambda *args, **kwargs: None)
    given = inputs(300, 501, 64)
    for name in ("hidden", "weight"):
        given[name].requires_grad_()
    loss = linear_cross_entropy(*given.values())
    gradients = 4 * (300 + 501) * 64
    assert gradients <= peak_bytes(loss.backward) < 1.1 * gradients


def test_what_is_saved():
    given = inputs(11, 61, 16)
    for name in ("hidden", "weight"):
        given[name].requires_grad_()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        linear_cross_entropy(*given.values())
    assert sorted(shapes) == [(), (11, 16), (61, 16)]


def test_costs():
    sizes = {"n_rows": 10, "n_cols": 1000, "width": 16, "itemsize": 2, "weight_itemsize": 4}
    forward, backward = cross_entropy.linear_forward_cost(**sizes), cross_entropy.linear_backward_cost(**sizes)
    assert forward.bytes == 10 * (16 * 2 + 8 + 4) + 4 * 1000 * 16 + 4 * 16 * (10 + 1000)
    assert forward.flops == 6 * 10 * 1000 * 16 + 10 * 10 * 1000
    assert backward.bytes == 16 * (10 * (4 + 2) + 1000 * (4 + 4))


@pytest.mark.gpu
def test_nothing_synchronises():
    given = inputs(11, 61, 16, torch.bfloat16)
    for name in ("hidden", "weight"):
        given[name].requires_grad_()
    linear_cross_entropy(*given.values()).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*given.values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
