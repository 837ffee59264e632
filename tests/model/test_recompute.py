"""Activation recomputation: bitwise identical, and no more saved than promised."""

import pytest
import torch

from kernels.ops import EAGER
from model.gpt import GPT
from model.recompute import Linear, OpCall
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


@pytest.mark.parametrize("level", [0, 1, 2])
def test_on_the_meta_device(level):
    gpt = GPT(TINY, EAGER).to("meta")
    gpt.set_recompute(level)
    idx = torch.zeros((3, 5), dtype=torch.int64, device="meta")
    logits, loss = gpt(idx, idx)
    assert logits.is_meta and logits.shape == (3, 5, TINY.vocab_size) and loss.shape == ()
    loss.backward()
    assert all(param.grad.is_meta and param.grad.shape == param.shape for param in gpt.parameters())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_losses_of_a_run(run_tiny, level):
    assert run_tiny(recompute=level).losses == run_tiny().losses


def test_what_a_layer_saves():
    """With recompute_from a Linear saves the inputs of that call; without it, its own input."""
    layer, source = Linear(6, 5), torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        x = torch.tanh(source)
        saved.clear()
        layer(x, OpCall(torch.tanh, (source,)))
        assert not any(tensor is x or tensor.data_ptr() == x.data_ptr() for tensor in saved)
        assert any(tensor is source for tensor in saved)
        saved.clear()
        layer(x)
        assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
