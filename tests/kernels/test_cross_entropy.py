"""Cross-entropy: no worse than eager in fp32, where the logits are, and never silently wrong over the caller's own."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import accuracy, cross_entropy, eager
from tests.conftest import ROOT, needs_interpreter
from tests.kernels.conftest import DEVICE, DTYPES, assert_no_worse, dtypes, far_apart, normal

V, VP = 50257, 50304
OPS = torch.ops.tritongpt
inplaces = pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])


def ids(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def reference(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eager as under autocast: 16-bit logits, and a loss in fp32."""
    return eager.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def inplace_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, **kwargs) -> torch.Tensor:
    return cross_entropy.cross_entropy(logits.clone(), targets, inplace_backward=True, **kwargs)


def implementation(inplace: bool):
    return inplace_cross_entropy if inplace else cross_entropy.cross_entropy


def surely_right(n_rows: int, n_cols: int, dtype: torch.dtype, margin: float = 6.9):
    """Every row gives its target all but e⁻ᵐᵃʳᵍⁱⁿ, at logits near 100."""
    logits, targets = normal(n_rows, n_cols) + 90, ids(n_rows, below=n_cols)
    rest = logits.scatter(1, targets[:, None], float("-inf")).logsumexp(1, keepdim=True)
    return logits.scatter(1, targets[:, None], rest + margin).to(dtype), targets


def infinite(dtype: torch.dtype):
    logits = normal(4, 61, dtype=dtype)
    logits[0, :50] = float("-inf")
    logits[1, 1:] = float("-inf")
    return logits, torch.tensor([60, 0, 5, 7], device=DEVICE)


def here_and_there(targets: torch.Tensor) -> torch.Tensor:
    return targets.where(ids(*targets.shape, below=3, seed=1) > 0, -1)


CASES = {
    "the vocabulary in padded rows": lambda dtype: (normal(3, VP, dtype=dtype, std=3.0)[:, :V], ids(3, below=V)),
    "last column": lambda dtype: (normal(1, VP, dtype=dtype)[:, :V], torch.tensor([V - 1], device=DEVICE)),
    "a whole block": lambda dtype: (normal(2, 8192, dtype=dtype), ids(2, below=8192)),
    "a block and one": lambda dtype: (normal(2, 8193, dtype=dtype), torch.tensor([8192, 0], device=DEVICE)),
    "small": lambda dtype: (normal(13, 61, dtype=dtype), ids(13, below=61)),
    "sequences": lambda dtype: (normal(3, 5, 70, dtype=dtype), ids(3, 5, below=70)),
    "confident and wrong": lambda dtype: (normal(16, 130, dtype=dtype, std=100.0), ids(16, below=130)),
    "confident and right": lambda dtype: surely_right(16, 130, dtype),
    "far from zero": lambda dtype: (normal(9, 61, dtype=dtype, mean=1000.0), ids(9, below=61)),
    "some ignored": lambda dtype: (normal(17, 61, dtype=dtype), here_and_there(ids(17, below=61))),
    "one row": lambda dtype: (normal(1, 61, dtype=dtype), ids(1, below=61)),
    "one class": lambda dtype: (normal(4, 1, dtype=dtype), torch.zeros(4, dtype=torch.int64, device=DEVICE)),
    "minus infinity": infinite,
    "no rows": lambda dtype: (normal(0, 61, dtype=dtype), ids(0, below=61)),
}
NARROW = ("the vocabulary in padded rows", "some ignored", *(name for name in CASES if "confident" in name))


def assert_numbers_no_worse(function, logits: torch.Tensor, targets: torch.Tensor) -> None:
    three = torch.tensor(3.0, device=DEVICE)
    given = {"logits": logits, "targets": targets}
    assert_no_worse(accuracy.compare_op(function, reference, given, [three]))
    assert function(logits, targets).dtype == torch.float32


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_numbers(make):
    assert_numbers_no_worse(cross_entropy.cross_entropy, *make(torch.float32))


@pytest.mark.parametrize("dtype", [DTYPES["fp16"], DTYPES["bf16"]], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", NARROW)
def test_numbers_in_16_bits(name, dtype):
    assert_numbers_no_worse(cross_entropy.cross_entropy, *CASES[name](dtype))


@dtypes
def test_numbers_in_place(dtype):
    assert_numbers_no_worse(inplace_cross_entropy, *CASES["some ignored"](dtype))


@dtypes
@pytest.mark.parametrize("margin", [6.9, 20.0])
def test_confident_logits_to_the_last_bits(margin, dtype):
    """A thousandth is lost where p is rounded to 16 bits before 1 is taken off it, 2e-9 where it is rounded to fp32."""
    logits, targets = surely_right(16, 130, dtype, margin)
    logits.requires_grad_()
    at_target = targets[:, None]
    loss = cross_entropy.cross_entropy(logits, targets)
    (dlogits,) = torch.autograd.grad(loss, logits, torch.tensor(16.0 * 2**14, device=DEVICE))
    others = logits.detach().double().scatter(1, at_target, float("-inf"))
    odds = (others.logsumexp(1, keepdim=True) - logits.detach().double().gather(1, at_target)).exp()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), odds.log1p().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        dlogits.double().gather(1, at_target) / 2**14, -odds / (1 + odds), rtol=max(eps, 1e-5), atol=0
    )


@inplaces
def test_padding_takes_no_part(inplace):
    padded = torch.full((6, 3, 192), float("nan"), device=DEVICE)
    padded[..., :40] = 1e4
    padded[..., :35] = normal(6, 3, 35)
    targets = ids(6, 3, below=35)
    logits = padded[..., :35].detach().requires_grad_()
    loss = cross_entropy.cross_entropy(logits, targets, inplace_backward=inplace)
    beyond, (dlogits,) = padded[..., 35:].clone(), torch.autograd.grad(loss, logits)
    want = normal(6, 3, 35).requires_grad_()
    want_loss = eager.cross_entropy(want, targets)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(dlogits, torch.autograd.grad(want_loss, want)[0])
    torch.testing.assert_close(padded[..., 35:], beyond, rtol=0, atol=0, equal_nan=True)
    assert (dlogits.data_ptr() == padded.data_ptr()) == inplace
    assert dlogits.stride() == ((3 * 192, 192, 1) if inplace else (3 * 128, 128, 1))


STRIDED = {
    "transposed": lambda: normal(61, 12).t(),
    "every third": lambda: normal(12, 183)[:, 1::3],
    "expanded": lambda: normal(1, 61).expand(12, 61),
    "offset": lambda: normal(12 * 61 + 1)[1:].view(12, 61),
    "sequences transposed": lambda: normal(3, 4, 61).transpose(0, 1),
}


@inplaces
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_any_strides(make, inplace):
    logits = make()
    targets = ids(*logits.shape[:-1][::-1], below=61).t()
    comparisons = accuracy.compare_op(
        lambda x, t: cross_entropy.cross_entropy(x, t, inplace_backward=inplace),
        lambda x, t: eager.cross_entropy(x, t.contiguous()),
        {"logits": logits, "targets": targets},
        [torch.tensor(1.0, device=DEVICE)],
    )
    assert_no_worse(comparisons)


@inplaces
@pytest.mark.usefixtures("overflow_is_reported")
def test_offsets_past_int32(inplace):
    near, targets = normal(3, 64, dtype=torch.float16), ids(3, below=64)
    far = far_apart(near).requires_grad_()
    (dlogits,) = torch.autograd.grad(cross_entropy.cross_entropy(far, targets, inplace_backward=inplace), far)
    near.requires_grad_()
    assert torch.equal(dlogits, torch.autograd.grad(cross_entropy.cross_entropy(near, targets), near)[0])
    assert dlogits.stride() == ((2**30, 1) if inplace else (128, 1))


@inplaces
def test_where_nothing_counts(inplace):
    logits = normal(5, 61)
    logits[2] = float("nan")
    logits.requires_grad_()
    loss = implementation(inplace)(logits, torch.full((5,), -1, device=DEVICE))
    assert loss.isnan()
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@needs_interpreter  # on a GPU it is an assertion on the device, after which the process is of no more use
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("target", [61, 122, -5])
def test_a_target_out_of_range(target, needs_grad):
    targets = ids(5, below=61)
    targets[3] = target
    logits = normal(5, 61).requires_grad_(needs_grad)
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy.cross_entropy(logits, targets)


def test_another_ignore_index():
    logits, targets = normal(20, 7), ids(20, below=7)
    for ignored in (3, -100, 50):
        targets[4] = ignored
        got = cross_entropy.cross_entropy(logits, targets, ignore_index=ignored)
        torch.testing.assert_close(got, F.cross_entropy(logits, targets, ignore_index=ignored))
        targets[4] = 0


def test_targets_of_another_shape():
    with pytest.raises(ValueError, match="targets"):
        cross_entropy.cross_entropy(normal(2, 3, 61), ids(3, 2, below=61))


@inplaces
def test_an_expanded_upstream_gradient(inplace):
    logits, targets = normal(5, 61).requires_grad_(), ids(5, below=61)
    factors = torch.tensor([1.0, 2.0, 4.0], device=DEVICE)
    (got,) = torch.autograd.grad((implementation(inplace)(logits, targets).expand(3) * factors).sum(), logits)
    (want,) = torch.autograd.grad(7 * eager.cross_entropy(logits, targets), logits)
    torch.testing.assert_close(got, want)
    part = torch.tensor([5.0, 7.0], device=DEVICE)[1]
    torch.testing.assert_close(torch.autograd.grad(implementation(inplace)(logits, targets), logits, part)[0], want)


def test_backward_twice_and_two_calls():
    logits, targets = normal(5, 61).requires_grad_(), ids(5, below=61)
    before = logits.detach().clone()
    loss = cross_entropy.cross_entropy(logits, targets)
    (want,) = torch.autograd.grad(eager.cross_entropy(logits, targets), logits)
    loss.backward(retain_graph=True)
    loss.backward()
    cross_entropy.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(logits.grad, 3 * want)
    assert torch.equal(logits, before)


def head():
    """Logits as a model has them: not a leaf."""
    hidden = normal(6, 8).requires_grad_()
    return hidden, hidden @ normal(8, 61, seed=1), ids(6, below=61)


def test_in_place_a_second_backward_is_an_error():
    _, logits, targets = head()
    loss = cross_entropy.cross_entropy(logits, targets, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_whoever_needs_the_logits_later_is_told():
    _, logits, targets = head()
    squares = (logits**2).sum()  # made before the loss, so that its backward comes after
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + cross_entropy.cross_entropy(logits, targets, inplace_backward=True)).backward()


@inplaces
def test_logits_used_again_after_the_loss(inplace):
    """Between forward and backward the logits are whole, and what was made after the loss comes first in backward."""
    hidden, logits, targets = head()
    loss = cross_entropy.cross_entropy(logits, targets, inplace_backward=inplace)
    torch.testing.assert_close(F.softmax(logits, 1), F.softmax(head()[1], 1))
    (got,) = torch.autograd.grad(loss + (logits**2).sum(), hidden)
    hidden, logits, targets = head()
    torch.testing.assert_close(
        got, torch.autograd.grad(eager.cross_entropy(logits, targets) + (logits**2).sum(), hidden)[0]
    )


def test_gradcheck():
    targets = torch.tensor([[3, -1], [0, 2]], device=DEVICE)
    logits = normal(2, 2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: cross_entropy.cross_entropy(logits, targets), logits, fast_mode=True)


def test_opcheck():
    logits, targets = normal(5, 7, dtype=DTYPES["bf16"]), here_and_there(ids(5, below=7))
    for inplace in (False, True):
        torch.library.opcheck(OPS.cross_entropy, (logits.clone().requires_grad_(), targets, -1, inplace))
    saved = OPS.cross_entropy(logits, targets, -1, False)[1:]
    args = (torch.tensor(2.0, device=DEVICE), logits, targets, -1, *saved)
    torch.library.opcheck(OPS.cross_entropy_backward, args)
    torch.library.opcheck(OPS.cross_entropy_backward_, args)


@inplaces
def test_compiles_as_one_graph(inplace):
    targets = here_and_there(ids(6, below=61))

    def loss_of(hidden, weight):
        return cross_entropy.cross_entropy(hidden @ weight.t(), targets, inplace_backward=inplace)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    inputs = {"hidden": normal(6, 8), "weight": normal(61, 8, seed=1)}
    one = [torch.tensor(1.0, device=DEVICE)]
    got, want = (accuracy.outputs_and_gradients(function, inputs, one) for function in (compiled, loss_of))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("dtype", [DTYPES["fp16"], DTYPES["bf16"]])
def test_under_autocast(dtype):
    targets = ids(6, below=61)
    with torch.autocast(DEVICE, dtype):
        for logits in (normal(6, 61).requires_grad_(), normal(6, 61, dtype=dtype).requires_grad_()):
            loss = cross_entropy.cross_entropy(logits, targets)
            assert loss.dtype == torch.float32
            assert torch.autograd.grad(loss, logits)[0].dtype == logits.dtype


def test_run_to_run():
    inputs = {"logits": normal(8, 9000), "targets": ids(8, below=9000)}
    one = [torch.tensor(1.0, device=DEVICE)]
    first, second = (accuracy.outputs_and_gradients(cross_entropy.cross_entropy, inputs, one) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_a_target_out_of_range_on_a_gpu():
    """In a process of its own: a device-side assertion is the end of it."""
    code = """
import torch
from kernels.cross_entropy import cross_entropy
cross_entropy(torch.zeros(4, 61, device="cuda"), torch.tensor([0, 1, 61, 2], device="cuda"))
print("not yet")
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stdout == "not yet\n" and "device-side assert" in done.stderr, done.stderr
