"""A block runs in two calls of the backend, and module by module where a hook or a replaced module has to be called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.ops import EAGER, Ops
from model.gpt import GPT, GPTConfig
from tests.conftest import DEVICE, TRITON

SMALL = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=8)
HALVES = ["attention", "mlp"]


def network(ops: Ops = EAGER) -> GPT:
    """No bias is zero and no gain one."""
    gpt = GPT(SMALL, ops)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in gpt.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))
    return gpt.to(DEVICE)


def loss_of(gpt: Callable) -> torch.Tensor:
    tokens = torch.randint(SMALL.vocab_size, (2, 6), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return gpt(tokens[:, :-1], tokens[:, 1:], return_logits=False)[1]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The halves that the backend ran, in one call each."""
    made: list[str] = []

    def count(kind: str) -> None:
        method = getattr(Ops, f"{kind}_sublayer")
        monkeypatch.setattr(Ops, f"{kind}_sublayer", lambda *args: made.append(kind) or method(*args))

    for kind in HALVES:
        count(kind)
    return made


@pytest.mark.parametrize("ops", [EAGER, TRITON], ids=["eager", "triton"])
def test_two_calls_per_block_and_the_loss_of_modules_one_by_one(ops, calls):
    gpt = network(ops)
    loss = loss_of(gpt)
    assert calls == HALVES * SMALL.n_layer
    calls.clear()
    for block in gpt.transformer.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.register_forward_hook(lambda *args: None)
    apart = loss_of(gpt)
    assert calls == []
    assert torch.equal(apart, loss) if ops is EAGER else torch.allclose(apart, loss, rtol=1e-6)


@pytest.mark.parametrize(
    "part", ["ln_1", "attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"]
)
def test_a_hook_takes_its_half_apart(part, calls):
    gpt, seen = network(), []
    gpt.transformer.h[0].get_submodule(part).register_forward_hook(lambda *args: seen.append(1))
    loss_of(gpt)
    apart = "attention" if part == "ln_1" or part.startswith("attn") else "mlp"
    assert calls == [kind for kind in HALVES if kind != apart] + HALVES and seen == [1]


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_was_replaced_is_called(calls):
    gpt = network()
    mlp: Any = gpt.transformer.h[0].mlp
    plain = loss_of(gpt)
    doubled = Doubled(SMALL.n_embd, 4 * SMALL.n_embd).to(DEVICE)
    doubled.load_state_dict(mlp.c_fc.state_dict())
    mlp.c_fc = doubled
    calls.clear()
    assert not torch.equal(loss_of(gpt), plain)
    assert calls == ["attention", *HALVES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [1, 2])
def test_the_same_bits_whatever_is_recomputed(level, dtype):
    def gradients(level: int) -> list[torch.Tensor]:
        gpt = network()
        gpt.set_recompute(level)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(gpt)
        loss.backward()
        return [loss.detach(), *(param.grad for param in gpt.parameters())]

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(level), gradients(0), strict=True))


def test_losses_of_a_run(run_tiny):
    assert run_tiny(recompute=1).losses == run_tiny(recompute=2).losses == run_tiny().losses
