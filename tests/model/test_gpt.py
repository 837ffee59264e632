"""The network: its parameters, its initial weights, its forward pass against a plain one, and sampling from it."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from kernels.ops import EAGER, SDPA
from model.gpt import GPT, PRESETS, GPTConfig
from tests.model.plain import PlainGPT2

TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=3, n_embd=24)


def random_tiny(ops=EAGER) -> GPT:
    """A tiny network in which no bias is zero, no gain is one, and the spread is wide enough to tell tokens apart."""
    gpt = GPT(TINY, ops, init=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in gpt.parameters():
            param.normal_(0.0, 0.3, generator=generator)
    return gpt


def random_ids(*shape: int, vocab_size: int = TINY.vocab_size, seed: int = 5) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def grads(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in gpt.named_parameters()}


# Parameters


@pytest.mark.parametrize(
    ("preset", "count"), [("d12", 124_439_808), ("d24", 354_823_168), ("d36", 774_030_080), ("d48", 1_557_611_200)]
)
def test_parameter_counts_of_the_presets(preset, count):
    assert PRESETS[preset].num_params() == count
    assert (PRESETS[preset].block_size, PRESETS[preset].vocab_size) == (1024, 50257)


def test_names_of_parameters():
    block = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"]
    block += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"]
    block += ["mlp.c_proj.bias"]
    expected = ["transformer.wte.weight", "transformer.wpe.weight"]
    expected += [f"transformer.h.{i}.{name}" for i in range(2) for name in block]
    expected += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    gpt = GPT(TINY)
    assert [name for name, _ in gpt.named_parameters()] == expected
    assert list(gpt.state_dict()) == [*expected, "lm_head.weight"]
    assert sum(param.numel() for param in gpt.parameters()) == TINY.num_params()


def loaded(assign: bool, without: str = "", **changed: torch.Tensor) -> GPT:
    state = {name: tensor.clone() for name, tensor in random_tiny().state_dict().items() if name != without}
    gpt = GPT(TINY)
    torch.nn.Sequential(gpt).load_state_dict(
        {f"0.{name}": tensor for name, tensor in (state | changed).items()}, strict=not without, assign=assign
    )
    return gpt


@pytest.mark.parametrize(
    "how",
    [
        lambda gpt: gpt.to("meta"),
        lambda gpt: gpt.to("meta").to_empty(device="cpu"),
        lambda gpt: gpt.double(),
        lambda gpt: copy.deepcopy(gpt),
        lambda gpt: pickle.loads(pickle.dumps(gpt)),
        lambda gpt: loaded(assign=False),
        lambda gpt: loaded(assign=True),
        lambda gpt: copy.deepcopy(loaded(assign=True)).to("meta"),
    ],
    ids=["meta", "to_empty", "double", "deepcopy", "pickle", "copied", "assigned", "all"],
)
def test_head_stays_tied(how):
    gpt = how(GPT(TINY))
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert sum(param.numel() for param in gpt.parameters()) == TINY.num_params()


@pytest.mark.parametrize("without", ["", "lm_head.weight", "transformer.wte.weight"])
def test_assigned_weights_are_those_that_copying_gives(without):
    """Where the head and the embedding differ, too: the head's are copied last."""
    head = {} if without == "lm_head.weight" else {"lm_head.weight": torch.full((TINY.vocab_size, TINY.n_embd), 7.0)}
    copied, assigned = (loaded(assign, without, **head) for assign in (False, True))
    assert assigned.lm_head.weight is assigned.transformer.wte.weight
    for name, param in copied.named_parameters():
        assert torch.equal(assigned.get_parameter(name), param), name


def test_a_head_of_its_own_stays_so():
    gpt = GPT(TINY)
    gpt.lm_head = torch.nn.Linear(TINY.n_embd, 3, bias=False)
    state = {name: torch.ones_like(tensor) for name, tensor in gpt.state_dict().items()}
    for assign in (False, True):
        gpt.load_state_dict(state, assign=assign)
        gpt.double()
        assert gpt.lm_head.weight.shape == (3, TINY.n_embd)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [({"n_embd": 25}, "multiple"), ({"n_layer": 0}, "n_layer"), ({"vocab_size": -1}, "vocab_size")],
)
def test_impossible_configuration(sizes, told):
    with pytest.raises(ValueError, match=told):
        GPTConfig(**sizes)


# Initialisation


def test_initial_weights_bit_for_bit():
    C = TINY.n_embd
    generator = torch.Generator().manual_seed(42)

    def draw(rows: int, columns: int, std: float = 0.02) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, std, generator=generator)

    residual_std = 0.02 / math.sqrt(2 * TINY.n_layer)
    expected = {"transformer.wte.weight": draw(TINY.vocab_size, C), "transformer.wpe.weight": draw(TINY.block_size, C)}
    for i in range(TINY.n_layer):
        expected[f"transformer.h.{i}.attn.c_attn.weight"] = draw(3 * C, C)
        expected[f"transformer.h.{i}.attn.c_proj.weight"] = draw(C, C, residual_std)
        expected[f"transformer.h.{i}.mlp.c_fc.weight"] = draw(4 * C, C)
        expected[f"transformer.h.{i}.mlp.c_proj.weight"] = draw(C, 4 * C, residual_std)
    for name, param in GPT(TINY).named_parameters():
        if name in expected:
            assert torch.equal(param, expected.pop(name)), name
        elif ".ln_" in name and name.endswith("weight"):
            assert torch.all(param == 1), name
        else:
            assert name.endswith("bias") and torch.all(param == 0), name
    assert not expected


def test_construction_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    GPT(TINY)
    GPT(TINY, init=False)
    assert torch.equal(torch.get_rng_state(), before)


# Forward


@pytest.mark.parametrize("return_logits", [True, False])
def test_forward_and_gradients_have_the_bits_of_a_plain_implementation(return_logits):
    gpt = random_tiny()
    idx, targets = random_ids(2, 11), random_ids(2, 11, seed=6)
    targets[0, 3] = -1
    plain = PlainGPT2(gpt.state_dict(), TINY)

    logits, loss = gpt(idx, targets, return_logits=return_logits)
    loss.backward()
    plain_logits, plain_loss = plain(idx, targets)
    plain_loss.backward()

    assert torch.equal(logits, plain_logits) if return_logits else logits is None
    assert torch.equal(loss, plain_loss)
    for name, grad in grads(gpt).items():
        assert torch.equal(grad, plain.get_parameter(name).grad), name


def test_forward_with_and_without_targets():
    gpt = random_tiny()
    idx, targets = random_ids(2, 11), random_ids(2, 11, seed=6)
    logits, loss = gpt(idx, targets)
    assert logits.shape == (2, 11, TINY.vocab_size) and loss.shape == ()
    last, no_loss = gpt(idx)
    assert last.shape == (2, 1, TINY.vocab_size) and no_loss is None
    torch.testing.assert_close(last[:, 0], logits[:, -1])
    assert gpt(idx, return_logits=False) == (None, None)
    some, no_loss = gpt(idx, positions=torch.tensor([13, 0, 21]))
    assert no_loss is None
    torch.testing.assert_close(some, torch.stack([logits[1, 2], logits[0, 0], logits[1, 10]]))
    with pytest.raises(ValueError, match="targets or positions, not both"):
        gpt(idx, targets, positions=torch.tensor([13]))


def test_sequence_longer_than_the_block():
    gpt = random_tiny()
    gpt(random_ids(1, TINY.block_size))
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        gpt(random_ids(1, TINY.block_size + 1))


def test_compiled_as_one_graph():
    """With torch's attention, and logits; test_backends.py has the two other backends, without."""
    gpt, same = random_tiny(SDPA), random_tiny(SDPA)
    idx, targets = random_ids(2, 11), random_ids(2, 11, seed=6)
    torch.compiler.reset()
    _, loss = torch.compile(gpt, backend="aot_eager", fullgraph=True)(idx, targets)
    _, expected = same(idx, targets)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, grad in grads(same).items():
        torch.testing.assert_close(grads(gpt)[name], grad, rtol=1e-4, atol=1e-6, msg=name)


# Sampling


@pytest.fixture
def seeded():
    """Sampling draws from torch's global random state: fix it, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield


def argmax_continuation(gpt: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        logits, _ = gpt(idx[:, -TINY.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize("how", [{"top_k": 1}, {"temperature": 1e-5}], ids=["top-1", "cold"])
def test_the_likeliest_only_is_argmax(seeded, how):
    gpt, start = random_tiny(), random_ids(3, 5)
    ids = gpt.generate(start, 20, **how)  # runs past the block, so that the context is cropped
    assert torch.equal(ids, argmax_continuation(gpt, start, 20))


def test_samples_follow_the_distribution(seeded):
    gpt, start = random_tiny(), random_ids(1, 5)
    ids = gpt.generate(start.expand(20_000, -1), 1, temperature=2.0)[:, -1]
    with torch.no_grad():
        probs = torch.softmax(gpt(start)[0][0, 0].double() / 2.0, dim=0)
    counts = torch.bincount(ids, minlength=TINY.vocab_size)
    deviation = (counts - 20_000 * probs).abs() / (20_000 * probs * (1 - probs)).sqrt()
    assert deviation.max() < 5  # standard deviations


def test_samples_are_among_the_top_k(seeded):
    gpt, start = random_tiny(), random_ids(1, 5)
    ids = gpt.generate(start.expand(2000, -1), 1, temperature=5.0, top_k=3)[:, -1]
    with torch.no_grad():
        top = torch.topk(gpt(start)[0][0, 0], 3).indices
    assert set(ids.tolist()) == set(top.tolist())


def test_top_k_beyond_the_vocabulary_is_all_of_it(seeded):
    assert random_tiny().generate(random_ids(1, 2), 3, top_k=1000).shape == (1, 5)


@pytest.mark.parametrize("top_k", [None, 5])
def test_ids_stay_below_the_vocabulary_where_the_head_is_padded(seeded, monkeypatch, top_k):
    gpt = random_tiny()
    plain = gpt.lm_head.forward
    monkeypatch.setattr(gpt.lm_head, "forward", lambda x: F.pad(plain(x), (0, 7), value=1e4))
    assert gpt.generate(random_ids(50, 2), 4, top_k=top_k).max() < TINY.vocab_size


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"top_k": -3}])
def test_impossible_sampling(how):
    with pytest.raises(ValueError, match=next(iter(how))):
        random_tiny().generate(random_ids(1, 2), 1, **how)
