"""A block in one call: bitwise identical to its ops called one by one, and only where nothing has to see them."""

from typing import Any

import pytest
import torch

from kernels.ops import EAGER
from model.gpt import GPT, GPTConfig
from tests.conftest import DEVICE, TRITON

SMALL = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=8)


def network(dtype: torch.dtype = torch.float32, level: int = 0, fused: bool = True) -> GPT:
    """No bias is zero and no gain one."""
    gpt = GPT(SMALL, TRITON)
    gpt.set_recompute(level)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in gpt.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))
    for block in gpt.transformer.h:
        block.fused = block.fused if fused else None
    return gpt.to(DEVICE, dtype)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SMALL.vocab_size, (2, 6), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def step(gpt: GPT, autocast: bool = False) -> dict[str, torch.Tensor]:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = gpt(*batch(), return_logits=False)[1]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """An entry per block that ran: whether in one call."""
    from model.gpt import Block

    made, fused = [], Block._fused

    def counted(self, *args):
        pair = fused(self, *args)
        made.append(pair is not None)
        return pair

    monkeypatch.setattr(Block, "_fused", counted)
    return made


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_the_bits_of_the_ops_one_by_one(autocast, level, calls):
    got = step(network(level=level), autocast)
    assert calls == [True] * SMALL.n_layer
    assert differing(got, step(network(level=level, fused=False), autocast)) == []


def test_the_bits_in_pure_bf16(calls):
    """But for the embeddings, whose gradient is rounded once less on its way."""
    got = step(network(torch.bfloat16))
    assert calls == [True] * SMALL.n_layer
    assert set(differing(got, step(network(torch.bfloat16, fused=False)))) <= {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }


def test_a_second_backward_pass_gives_the_same():
    gpt = network()
    loss = gpt(*batch(), return_logits=False)[1]
    first = torch.autograd.grad(loss, list(gpt.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(gpt.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_frozen_has_no_gradient_and_costs_no_product(calls, monkeypatch):
    products, mm = [], torch.Tensor.mm
    monkeypatch.setattr(torch.Tensor, "mm", lambda a, b: products.append(1) or mm(a, b))
    gpt = network()
    for name, param in gpt.named_parameters():
        param.requires_grad_("ln_" in name or "c_fc.bias" in name)
    got = step(gpt)
    assert all(calls) and len(products) == 4 * SMALL.n_layer  # those of the activations
    assert set(got) == {"loss"} | {name for name, param in gpt.named_parameters() if param.requires_grad}
    every = step(network())
    assert all(torch.equal(got[name], every[name]) for name in got)


def test_a_second_derivative_is_refused():
    gpt = network()
    loss = gpt.transformer.h[0](torch.randn(1, 4, SMALL.n_embd, device=DEVICE)).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, gpt.transformer.h[0].ln_1.weight, create_graph=True)


def test_a_branch_that_is_alone_differentiated(calls):
    """Gradients of the other output are zeros, and an expanded one has no memory of its own."""
    x, results = torch.randn(1, 4, SMALL.n_embd, device=DEVICE), []
    for fused in (True, False):
        block = network(fused=fused).transformer.h[0]
        leaf = x.clone().requires_grad_()
        block(leaf, None, as_pair=True)[1].sum().backward()
        results.append({"x": leaf.grad, **{n: p.grad for n, p in block.named_parameters()}})
    assert calls[0] and differing(*results) == []


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "part", ["ln_1", "attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"]
)
def test_a_hook_takes_the_block_apart(part, calls):
    gpt, seen = network(), []
    gpt.transformer.h[0].get_submodule(part).register_forward_hook(lambda *args: seen.append(1))
    step(gpt)
    assert calls == [False, True] and seen == [1]


def test_a_layer_that_was_replaced_is_called(calls):
    gpt = network()
    mlp: Any = gpt.transformer.h[0].mlp
    plain = gpt(*batch(), return_logits=False)[1]
    doubled = Doubled(SMALL.n_embd, 4 * SMALL.n_embd).to(DEVICE)
    doubled.load_state_dict(mlp.c_fc.state_dict())
    mlp.c_fc = doubled
    calls.clear()
    assert not torch.equal(gpt(*batch(), return_logits=False)[1], plain)
    assert calls == [False, True]


def test_other_ops_in_the_table():
    assert GPT(SMALL, TRITON._replace(cross_entropy=EAGER.cross_entropy)).transformer.h[0].fused
    for op in ("layer_norm", "add_layer_norm", "gelu", "attention"):
        assert GPT(SMALL, TRITON._replace(**{op: getattr(EAGER, op)})).transformer.h[0].fused is None
    assert GPT(SMALL, EAGER).transformer.h[0].fused is None


def test_what_the_ops_refuse_is_refused_by_name():
    block = network().transformer.h[0]
    x = torch.randn(1, 4, SMALL.n_embd, device=DEVICE)
    with pytest.raises(ValueError, match="int64"):
        block(x.long())
    with pytest.raises(ValueError, match="differ in shape"):
        block(x, x[:, :2])
    with pytest.raises(ValueError, match="as wide as a row"):
        block.ln_2.weight = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        block(x)


def test_autocast_is_on_again_afterwards():
    with torch.autocast(DEVICE, torch.bfloat16):
        network().transformer.h[0](torch.randn(1, 4, SMALL.n_embd, device=DEVICE))
        assert torch.is_autocast_enabled(DEVICE)
