"""The network on the triton backend: the numbers of eager, bitwise identical runs, one graph under torch.compile."""

from typing import Any

import pytest
import torch

from kernels import accuracy, ops
from kernels.ops import EAGER, SDPA, Ops
from model.gpt import GPT, GPTConfig
from tests.conftest import DEVICE, TINY, TRITON
from tests.kernels.conftest import assert_no_worse

ODD = GPTConfig(block_size=40, vocab_size=131, n_layer=2, n_head=3, n_embd=60)  # nothing is a power of two
MIX = TRITON._replace(attention=EAGER.attention, gelu=EAGER.gelu)
SHORT = GPTConfig(block_size=12, vocab_size=61, n_layer=2, n_head=1, n_embd=32)


def batch(config: GPTConfig, B: int = 3, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    T = config.block_size - 3
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def network(config: GPTConfig, backend: Ops) -> GPT:
    return GPT(config, backend).to(DEVICE)


def results(gpt: GPT, return_logits: bool) -> dict[str, torch.Tensor]:
    logits, loss = gpt(*batch(gpt.config), return_logits=return_logits)
    loss.backward()
    assert (logits is None) == (not return_logits)
    out = {"loss": loss.detach()} | {name: param.grad for name, param in gpt.named_parameters()}
    return out | ({"logits": logits.detach()} if return_logits else {})


@pytest.mark.parametrize(
    ("backend", "config", "return_logits"),
    [(TRITON, TINY, True), (TRITON, ODD, False), (MIX, ODD, True)],
    ids=["triton-tiny-logits", "triton-odd-loss alone", "mix-odd-logits"],
)
def test_loss_logits_and_gradients(backend, config, return_logits):
    truth = results(network(config, EAGER).double(), return_logits)
    ours, eager = (results(network(config, ops), return_logits) for ops in (backend, EAGER))
    n_rows = batch(config)[0].numel()
    summed = {name: 1 if name in ("loss", "logits") else n_rows for name in truth}
    assert_no_worse([accuracy.compare(name, ours[name], eager[name], truth[name], summed[name]) for name in truth])


def losses_of_training(backend: Ops, n_steps: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    gpt = network(SHORT, backend).to(dtype)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    losses = []
    for step in range(n_steps):
        loss = gpt(*batch(SHORT, B=1, seed=step % 2), return_logits=False)[1]
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def test_steps_of_training():
    ours, eager = losses_of_training(TRITON), losses_of_training(EAGER)
    truth = losses_of_training(EAGER, dtype=torch.float64)
    assert truth[-1] < truth[0] - 0.5
    assert_no_worse([accuracy.compare("losses", ours, eager, truth)])
    assert torch.equal(ours[:2], losses_of_training(TRITON, n_steps=2)), "two runs of the same kernels differ"


ATOMIC = ("index_put", "scatter_add", "scatter_reduce", "index_add", "index_reduce", "embedding_dense_backward")
"""what torch.compile's code generation makes atomic additions of"""


@pytest.mark.parametrize("table", [TRITON, EAGER], ids=["triton", "eager"])
def test_one_graph_under_compile(table):
    """With the bits of no graph, although backward recomputes; and without an atomic addition if it is decomposed as
    for a GPU: the sum of an atomic addition has another order on every run."""
    from functorch.compile import make_boxed_func  # here, since every worker would import them for two seconds
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    names = []

    def look(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def results_of(compiled: bool) -> list[torch.Tensor]:
        gpt = network(TINY, table)
        gpt.set_recompute(2 if compiled else 0)
        run: Any = torch.compile(gpt, fullgraph=True, backend=backend) if compiled else gpt
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = run(*batch(TINY), return_logits=False)[1]
        loss.backward()
        return [loss.detach(), *(param.grad for param in gpt.parameters())]

    backend = aot_autograd(fw_compiler=look, bw_compiler=look, decompositions=select_decomp_table())
    got, want = results_of(True), results_of(False)
    assert any("tritongpt.embedding_backward" in name or "tritongpt.lookup_backward" in name for name in names)
    assert [name for name in names if any(word in name for word in ATOMIC)] == []
    for ours, theirs in zip(got, want, strict=True):  # decomposed, torch's own operations round elsewhere
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=0 if table is TRITON else 1e-6 * float(theirs.abs().max())
        )


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batches(shape, level):
    for backend in (TRITON, EAGER):
        gpt, idx = network(TINY, backend), torch.zeros(shape, dtype=torch.int64, device=DEVICE)
        gpt.set_recompute(level)
        logits, loss = gpt(idx, idx)
        assert logits.shape == (*shape, TINY.vocab_size) and loss.isnan()  # a mean over nothing
        logits.sum().backward()
        assert not any(param.grad.any() for param in gpt.parameters())


def test_parse():
    assert ops.parse("eager", DEVICE) == EAGER
    assert ops.parse("triton", DEVICE) == TRITON
    assert ops.parse("triton,attention=eager,gelu=eager", DEVICE) == MIX
    assert ops.parse("sdpa", DEVICE) == SDPA != EAGER
    assert ops.parse("triton,attention=sdpa", DEVICE) == TRITON._replace(attention=SDPA.attention)
    assert ops.parse("eager,gelu=triton", DEVICE) == EAGER._replace(gelu=TRITON.gelu)
    for wrong, told in {"cuda": "unknown backend", "triton,relu=eager": "unknown op", "triton,gelu": "backend"}.items():
        with pytest.raises(ValueError, match=told):
            ops.parse(wrong, DEVICE)


def test_default_backend(monkeypatch):
    assert [ops.default_backend(device_type) for device_type in ("cuda", "mps", "cpu")] == ["triton", "eager", "eager"]
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)  # as where triton is not installed
    assert ops.default_backend("cuda") == "eager"
    assert ops.default_backend("cpu", elsewhere="sdpa") == "sdpa"
