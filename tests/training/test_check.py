"""`--check 1` passes what is right, and names the op that is not."""

import pytest
import torch

import train
from kernels import column_sums, ops, sublayer
from kernels.ops import EAGER, FORWARD_ONLY, Ops
from model.gpt import GPT
from tests.conftest import DEVICE, TINY, TRITON, command_line
from training.check import check


class _WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is 1% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def broken(op: str, forward: bool) -> Ops:
    """EAGER with one op that is 1% off, forward or backward only."""
    right = getattr(EAGER, op)

    def wrong(*inputs):
        if forward:
            outputs = right(*inputs)
            return (outputs[0], 1.01 * outputs[1]) if isinstance(outputs, tuple) else 1.01 * outputs
        return right(*(_WrongGradient.apply(x) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs))

    return EAGER._replace(**{op: wrong})


@pytest.fixture
def report_of(capsys):
    """Check a backend: whether it is right, and the lines that were printed."""

    def report(ops: Ops, dtype: torch.dtype = torch.float32) -> tuple[bool, list[str]]:
        B = 1 if ops is TRITON else 3  # kernels may be interpreted
        tokens = torch.randint(TINY.vocab_size, (B, 33), generator=torch.Generator().manual_seed(5)).to(DEVICE)
        right = check(GPT(TINY, ops).to(DEVICE), tokens[:, :-1], tokens[:, 1:], dtype)
        return right, capsys.readouterr().out.splitlines()

    return report


@pytest.mark.parametrize(
    ("op", "forward"),
    [(op, forward) for op in Ops._fields for forward in (True, False) if forward or op not in FORWARD_ONLY],
    ids=lambda value: value if isinstance(value, str) else "forward" if value else "backward",
)
def test_one_wrong_op_is_named(report_of, op, forward):
    right, lines = report_of(broken(op, forward))
    assert not right
    assert f"the first: {op} 0 (" in lines[-1]
    calls = lines[1 : next(i for i, line in enumerate(lines) if "loss and gradients" in line)]
    assert all(line.startswith(op) for line in calls if "OFF" in line)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", [EAGER, TRITON], ids=["eager", "triton"])
def test_what_is_right_passes(report_of, backend, dtype):
    right, lines = report_of(backend, dtype)
    assert right, "\n".join(lines)
    text = "\n".join(lines)
    assert "OFF" not in text and "no worse than eager" in lines[-1]
    for name in Ops._fields:
        assert f"\n{name} 0 " in text
    for name, _ in GPT(TINY).named_parameters():
        assert f"\n{name.removeprefix('transformer.')} " in text


def test_what_fresh_weights_would_hide(report_of):
    """A LayerNorm that forgets its bias is right while the bias is zero."""

    def forgets(x, weight, bias):
        return EAGER.layer_norm(x, weight, 0 * bias)

    right, lines = report_of(EAGER._replace(layer_norm=forgets))
    assert not right and "the first: layer_norm 0 (" in lines[-1]


def test_slices_of_the_batch_make_no_difference(report_of, monkeypatch):
    whole = report_of(broken("gelu", True))
    monkeypatch.setattr("training.check._SLICE_BYTES", 1)  # a sequence at a time
    right, lines = report_of(broken("gelu", True))
    assert not right and lines[-1] == whole[1][-1]
    assert report_of(EAGER)[0]


def test_a_gradient_that_is_missing_is_named(report_of):
    def forgets(x, weight, bias):
        return EAGER.layer_norm(x, weight.detach(), bias)

    right, lines = report_of(EAGER._replace(layer_norm=forgets))
    assert not right and "the first: layer_norm 0 (dweight)" in lines[-1]


def test_a_broken_bias_gradient_inside_half_a_block_is_named(report_of, monkeypatch):
    """No op has it by itself: kernels leave column sums behind, and half a block adds them up."""
    add_up = column_sums.add_up

    def wrong(partials: torch.Tensor, *outs: torch.Tensor | None) -> None:
        add_up(partials, *outs)
        if len(outs) == 1:  # LayerNorm, which is an op, has more
            outs[0].mul_(1.01)

    monkeypatch.setattr(column_sums, "add_up", wrong)
    right, lines = report_of(TRITON)
    off = [line.split()[0] for line in lines if "OFF" in line]
    assert not right and off == [f"h.{layer}.{part}.bias" for layer in (0, 1) for part in ("attn.c_attn", "mlp.c_fc")]


def test_an_optional_argument_is_checked_where_it_is_given(report_of, monkeypatch):
    def add_norm(ops, stream, norm):
        branch = 0 * stream.residual if stream.branch is None else stream.branch
        return ops.add_layer_norm(stream.residual, branch, *norm, norm[1])

    def forgets(residual, branch, weight, bias, branch_bias=None):  # which the last LayerNorm is not given
        bias_of_branch = [] if branch_bias is None else [branch_bias.detach()]
        return EAGER.add_layer_norm(residual, branch, weight, bias, *bias_of_branch)

    monkeypatch.setattr(sublayer, "add_norm", add_norm)
    assert report_of(EAGER)[0]
    right, lines = report_of(EAGER._replace(add_layer_norm=forgets))
    assert not right and "the first: add_layer_norm 0 (dbranch_bias)" in lines[-1]


def test_the_command(tiny, tmp_path, capsys, monkeypatch):
    flags = tiny | {"--device": DEVICE, "--backend": "triton", "--check": 1, "--output_dir": tmp_path / "run"}
    flags |= {"--batch_size": 1, "--total_batch_size": 16}
    assert train.main(command_line(flags)) == 0
    assert "no worse than eager" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(ops, "parse", lambda *args: broken("attention", True))
    assert train.main(command_line(flags)) == 1
    assert "the first: attention 0 (out0)" in capsys.readouterr().out
