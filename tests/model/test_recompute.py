"""Activation recomputation: bitwise identical. tests/budgets counts what it saves."""

import pytest
import torch

from kernels.ops import EAGER
from model.gpt import GPT
from tests.conftest import TINY


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(TINY.vocab_size, (3, 33), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(level: int, dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
    gpt = GPT(TINY, EAGER)
    gpt.set_recompute(level)
    network = torch.compile(gpt, fullgraph=True, backend="aot_eager") if compiled else gpt
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = network(*batch(), return_logits=False)[1]
    loss.backward()
    return [loss.detach(), *(param.grad for param in gpt.parameters())]


@pytest.mark.parametrize(
    ("level", "dtype", "compiled"),
    [
        (1, torch.float32, False),
        (2, torch.float32, False),
        (1, torch.bfloat16, False),
        (2, torch.bfloat16, False),
        (2, torch.bfloat16, True),
    ],
    ids=["1-fp32", "2-fp32", "1-bf16", "2-bf16", "2-bf16-compiled"],
)
def test_the_same_bits(level, dtype, compiled):
    want = loss_and_gradients(0, dtype, compiled=False)
    got = loss_and_gradients(level, dtype, compiled)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def test_losses_of_a_run(run_tiny):
    assert run_tiny(recompute=1).losses == run_tiny(recompute=2).losses == run_tiny().losses
