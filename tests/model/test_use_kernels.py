"""transformers' GPT-2 on a table of ops: no worse than without, under Trainer and in generation, and taken back to the
bit."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as hf_logging

from kernels import accuracy
from kernels.dispatch import MAX_HEAD_DIM
from kernels.ops import EAGER, Ops
from model import hf_kernels
from model.hf import use_kernels, without_kernels
from tests.conftest import DEVICE, TRITON
from tests.kernels.conftest import assert_no_worse

V, T = 37, 7
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
SMALL = {"n_layer": 2, "n_head": 1, "n_embd": 32, "vocab_size": V, "n_positions": 16}
IDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def random_model(**config) -> GPT2LMHeadModel:
    """Of random weights, large enough for each to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = GPT2LMHeadModel(GPT2Config(**(SMALL | IDS | NO_DROPOUT | config)))
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.3)
    return nn.Module.to(model, DEVICE).train()


def with_kernels(model: GPT2LMHeadModel, ops: Ops) -> GPT2LMHeadModel:
    """A copy of the model, with the ops."""
    model = copy.deepcopy(model)
    use_kernels(model, ops)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(model: GPT2LMHeadModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def results(model: GPT2LMHeadModel, ids: torch.Tensor, labels: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    loss = model(ids, labels=labels, **kwargs).loss
    return {"loss": loss.detach(), "logits": model(ids).logits.detach()} | gradients(model, loss)


def truth_of(model: GPT2LMHeadModel, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """In float64 on the CPU, where transformers would compute the loss in float32."""
    model = copy.deepcopy(model).cpu().double()
    ids, labels = ids.cpu(), labels.cpu()
    logits = model(ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return {"loss": loss.detach(), "logits": logits.detach()} | gradients(model, loss)


def assert_results_no_worse(ours, theirs, truth, n_rows: int, **rule) -> None:
    summed = {name: 1 if name in ("loss", "logits") else n_rows for name in truth}
    assert ours.keys() == theirs.keys() == truth.keys()
    assert_no_worse([accuracy.compare(k, ours[k], theirs[k], truth[k], summed[k], **rule) for k in truth])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, of which some are ignored."""
    ids = tokens(2, T)
    labels = ids.clone()
    labels[0, 2:4], labels[1, :5] = -100, -100
    return ids, labels


@pytest.fixture
def warnings_of():
    """What use_kernels warns of, as if for the first time."""
    hf_logging.warning_once.cache_clear()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    hf_kernels.logger.addHandler(handler)
    yield messages
    hf_kernels.logger.removeHandler(handler)


@pytest.fixture
def counted():
    """Eager, and how often each op was called."""
    calls = dict.fromkeys(Ops._fields, 0)

    def count(name, op):
        def call(*args):
            calls[name] += 1
            return op(*args)

        return call

    return Ops(*(count(name, op) for name, op in EAGER._asdict().items())), calls


# The same numbers


@pytest.mark.parametrize("ops", [TRITON, EAGER], ids=["triton", "eager"])
def test_logits_loss_and_gradients(ops, batch):
    theirs = random_model(n_head=2)
    ours = with_kernels(theirs, ops)
    truth = truth_of(theirs, *batch)
    assert truth["logits"].std() > 1 and all(gradient.abs().max() > 1e-4 for gradient in truth.values())
    assert_results_no_worse(results(ours, *batch), results(theirs, *batch), truth, batch[0].numel())
    assert all(param.grad is None for param in theirs.parameters())


def test_autocast(batch):
    theirs = random_model(n_layer=1)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, eager = results(with_kernels(theirs, TRITON), *batch), results(theirs, *batch)
    rule = {"inner": torch.bfloat16, "n_averaged": batch[0].numel()}
    assert_results_no_worse(ours, eager, truth_of(theirs, *batch), batch[0].numel(), **rule)


def test_each_op_is_called(counted, batch):
    ops, calls = counted
    model = with_kernels(random_model(), ops)
    model(batch[0], labels=batch[1])
    per_pass = {"layer_norm": 5, "gelu": 2, "attention": 2}
    assert calls == dict.fromkeys(calls, 0) | per_pass | {"linear_cross_entropy": 1}
    calls.update(dict.fromkeys(calls, 0))
    model.eval().generate(batch[0], max_new_tokens=3, do_sample=False)
    per_token = {"layer_norm": 3 * 5, "gelu": 3 * 2, "attention": 2, "decode_attention": 2 * 2}
    assert calls == dict.fromkeys(calls, 0) | per_token


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its name from 5.24 on is another
def test_gradient_checkpointing(batch):
    model = with_kernels(random_model(n_layer=1), TRITON)
    plain = results(model, *batch)
    model.gradient_checkpointing_enable()
    recomputed = []
    model.get_submodule("transformer.h.0.mlp.act").register_forward_hook(lambda *args: recomputed.append(True))
    again = results(model, *batch)
    assert len(recomputed) == 3, "forward, backward, and once more for logits"
    assert [name for name in plain if not torch.equal(again[name], plain[name])] == []


@pytest.mark.slow
def test_compile(batch):
    model = with_kernels(random_model(), TRITON)
    plain = results(model, *batch)
    model.compile(backend="aot_eager")
    compiled = results(model, *batch)
    assert [name for name in plain if not torch.equal(compiled[name], plain[name])] == []
    stays = with_kernels(random_model(attn_pdrop=0.1), EAGER)
    assert torch._dynamo.explain(stays)(batch[0]).graph_break_count == 0, "a warning that is not traced"


# The loss


def test_no_logits_in_training_alone(batch):
    ids, labels = batch
    model = with_kernels(random_model(), EAGER)
    alone = model(ids, labels=labels, output_hidden_states=True)
    assert alone.logits is None and len(alone.hidden_states) == 3
    for kept in (model(ids, labels=labels, logits_to_keep=0), model(ids), model.eval()(ids, labels=labels)):
        assert kept.logits.shape == (2, T, V)


@pytest.mark.parametrize("ops", [TRITON, EAGER], ids=["triton", "eager"])
def test_number_of_items(ops, batch):
    ids, labels = batch
    theirs = random_model(n_layer=1)
    ours = with_kernels(theirs, ops)
    for n_items in (64, torch.tensor([64])):  # of one process, of one replica of DataParallel
        expected = theirs(ids, labels=labels, num_items_in_batch=n_items).loss
        torch.testing.assert_close(ours(ids, labels=labels, num_items_in_batch=n_items).loss, expected)
    nothing = ours(ids, labels=torch.full_like(labels, -100), num_items_in_batch=64).loss
    assert nothing == 0 and not any(gradient.any() for gradient in gradients(ours, nothing).values())


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on the device, not an exception")
def test_a_label_of_minus_one_stays_out_of_range(batch):
    ids, labels = batch
    labels[1, 3] = -1
    for model in (random_model(), with_kernels(random_model(), TRITON._replace(attention=EAGER.attention))):
        with pytest.raises(IndexError, match="out of bounds"):
            model(ids, labels=labels)


def double(model, args, output):
    return 2 * output


def sum_of_logits(logits, labels, vocab_size, **kwargs):
    return logits.sum()


def custom_loss(model):
    model.loss_function = sum_of_logits


LOSSES_OF_THEIRS: dict[str, tuple[Callable, dict]] = {
    "a hook on the head": (lambda model: model.lm_head.register_forward_hook(double), {}),
    "another loss": (custom_loss, {}),
    "a tuple": (lambda model: None, {"return_dict": False}),
    "another label to ignore": (lambda model: None, {"ignore_index": int(tokens(2, T)[0, 1])}),
    "labels that are shifted": (lambda model: None, {"shift_labels": tokens(2, T, seed=2)}),
}


@pytest.mark.parametrize("case", LOSSES_OF_THEIRS)
def test_losses_that_need_logits(case):
    change, kwargs = LOSSES_OF_THEIRS[case]
    theirs, ids = random_model(), tokens(2, T)
    change(theirs)
    losses = [model(ids, labels=ids, **kwargs)[0] for model in (theirs, with_kernels(theirs, EAGER))]
    torch.testing.assert_close(*losses)


# Trainer


def trained(model: GPT2LMHeadModel, folder, **settings) -> tuple[torch.Tensor, transformers.Trainer]:
    """Losses of five steps of two micro-batches: one sequence, whose number of counted labels changes."""
    ids = tokens(5)
    rows = [{"input_ids": ids, "labels": torch.where(torch.arange(5) < 3 * (i % 2), -100, ids)} for i in range(10)]
    settings = {"max_steps": 5, "learning_rate": 0.03} | settings
    args = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    trainer.train()
    return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line]), trainer


needs_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="trains on the CPU, where kernels are interpreted")


@needs_cpu
def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    theirs = random_model(n_layer=1)
    expected, reference = trained(copy.deepcopy(theirs), tmp_path)
    losses, trainer = trained(with_kernels(theirs, TRITON), tmp_path)
    truth, _ = trained(copy.deepcopy(theirs).double(), tmp_path)
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.5
    assert_no_worse([accuracy.compare("losses", losses, expected, truth)])
    predicted, wanted = (each.predict(each.train_dataset) for each in (trainer, reference))  # evaluates, too
    torch.testing.assert_close(predicted.metrics["test_loss"], wanted.metrics["test_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(*(torch.tensor(each.predictions) for each in (predicted, wanted)), rtol=1e-4, atol=1e-4)


@needs_cpu
def test_taken_back_after_mixed_precision(tmp_path):
    """accelerate leaves a `forward` in the model, which calls ours."""
    pytest.importorskip("accelerate")
    model = with_kernels(random_model(), EAGER)
    trained(model, tmp_path, bf16=True, max_steps=1)
    without_kernels(model)
    fresh = random_model()
    fresh.load_state_dict(model.state_dict())
    ids = tokens(2, T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids, labels=ids).logits.bfloat16(), fresh(ids, labels=ids).logits)


# Generation, and attention that the kernels do not compute


@pytest.mark.parametrize(("cache", "ops"), [("dynamic", TRITON), ("static", EAGER)], ids=["dynamic", "static"])
def test_greedy_generation(cache, ops):
    theirs = random_model(n_head=2).eval()
    ours = with_kernels(theirs, ops)
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected, got = (model.generate(tokens(2, T), **settings) for model in (theirs, ours))
    assert len(expected[:, T:].unique()) > 3, "ids that hardly vary show little"
    assert torch.equal(got, expected)


@torch.no_grad()
def test_left_padding(warnings_of, sdpa_calls):
    theirs = random_model().eval()
    ours, exact = with_kernels(theirs, TRITON), copy.deepcopy(theirs).double()
    ids, mask = tokens(2, T), torch.ones(2, T, dtype=torch.int64, device=DEVICE)
    ours(ids, attention_mask=mask)
    assert sdpa_calls == [] and warnings_of == [], "nothing is masked"
    ids[0, :4], mask[0, :4] = 0, 0
    # Padding has nothing to attend to, and its rows mean nothing.
    logits = [model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs, exact)]
    assert_no_worse([accuracy.compare("logits", *logits)])
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected, got = (model.generate(ids, **settings) for model in (theirs, ours))
    assert torch.equal(got, expected)
    assert len(warnings_of) == 1 and "padding" in warnings_of[0], "once"


def call_after_a_cache(n_queries: int):
    def call(model):
        past = model(tokens(2, 5), use_cache=True)
        name = "cache" if "cache" in past else "past_key_values"  # of transformers before 5.24
        return model(tokens(2, n_queries, seed=2), **{name: past[name]}).logits

    return call


def call(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return model(tokens(2, T)).logits


def call_with_encoder(model):
    states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    return model(tokens(2, T), encoder_hidden_states=states).logits


FALLBACKS: dict[str, tuple[dict, Callable]] = {
    "attn_pdrop=0.0 instead of 0.1": ({"attn_pdrop": 0.1}, call),
    "cross-attention": ({"add_cross_attention": True}, call_with_encoder),
    f"head_dim of {MAX_HEAD_DIM + 8}": ({"n_embd": MAX_HEAD_DIM + 8, "n_head": 1}, call),
    "another mask": ({}, call_after_a_cache(3)),
    "gradients through a cache": ({}, call_after_a_cache(1)),
}


@pytest.mark.parametrize("word", FALLBACKS)
def test_attention_that_stays(word, warnings_of):
    config, call = FALLBACKS[word]
    theirs = random_model(**config)
    ours = with_kernels(theirs, EAGER)
    for _ in range(2):
        torch.testing.assert_close(call(ours), call(theirs), rtol=1e-4, atol=1e-4)
    assert [message for message in warnings_of if word in message] == warnings_of and len(warnings_of) == 1


@torch.no_grad()
def test_one_query_after_a_cache(warnings_of):
    theirs, call = random_model(n_head=2), call_after_a_cache(1)
    torch.testing.assert_close(call(with_kernels(theirs, TRITON)), call(theirs), rtol=1e-4, atol=1e-4)
    assert warnings_of == []


@pytest.mark.parametrize("field", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_scores_of_another_scale(field, warnings_of):
    theirs = random_model(**{field: True})
    torch.testing.assert_close(call(with_kernels(theirs, EAGER)), call(theirs), rtol=1e-4, atol=1e-4)
    assert all("scaled" in message for message in warnings_of)


# What is left, refused, and taken back


class OwnModel(GPT2LMHeadModel):
    pass


def own_class(model):
    model.__class__ = OwnModel


def own_forward(model):
    norm = model.transformer.ln_f
    norm.forward = lambda x: 2 * F.layer_norm(x, (32,), norm.weight, norm.bias)


LEFT: dict[str, tuple[dict, Callable | None]] = {
    "activation_function is relu": ({"activation_function": "relu"}, None),
    "layer_norm_epsilon is 0.1": ({"layer_norm_epsilon": 0.1}, None),
    "attn_implementation is eager": ({"attn_implementation": "eager"}, None),
    "OwnModel is a subclass": ({}, own_class),
    "replaced": ({}, own_forward),
}


@pytest.mark.parametrize("words", LEFT)
def test_parts_that_stay(words, warnings_of):
    config, change = LEFT[words]
    theirs = random_model(**config)
    if change:
        change(theirs)
    use_kernels(ours := theirs if change is own_forward else copy.deepcopy(theirs), EAGER)
    got = ours(tokens(2, T), labels=tokens(2, T), logits_to_keep=0)
    without_kernels(ours)
    expected = theirs(tokens(2, T), labels=tokens(2, T))
    torch.testing.assert_close((got.loss, got.logits), (expected.loss, expected.logits), rtol=1e-4, atol=1e-4)
    assert len(warnings_of) == 1 and words in warnings_of[0]


def test_the_other_tanh_gelu(counted):
    ops, calls = counted
    theirs = random_model(activation_function="gelu_pytorch_tanh")
    torch.testing.assert_close(call(with_kernels(theirs, ops)), call(theirs), rtol=1e-4, atol=1e-4)
    assert calls["gelu"] == 2


def test_refusals(monkeypatch):
    wrongs: list = [nn.Linear(2, 2), nn.Sequential(random_model()), random_model().transformer]
    for wrong in wrongs:
        with pytest.raises(TypeError, match=f"GPT2LMHeadModel of transformers, not {type(wrong).__name__}"):
            use_kernels(wrong, EAGER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no GPU.*ops="):
        use_kernels(random_model())


def test_default_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hf_kernels, "triton_ops", {"cuda": EAGER}.__getitem__)
    model = random_model()
    use_kernels(model)
    assert model.kernel_ops is EAGER


def state_of(model) -> list:
    """All but numbers: classes, attributes and settings of every module."""
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    return [modules, list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation]


def test_taken_back(batch):
    model = random_model()
    before, state, params = results(model, *batch), state_of(model), list(map(id, model.parameters()))
    use_kernels(model, EAGER)
    assert list(model.state_dict()) == state[1] and list(map(id, model.parameters())) == params
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not all(torch.equal(tensor, before[name]) for name, tensor in results(model, *batch).items())
    for _ in range(2):
        without_kernels(model)
        assert state_of(model) == state and list(map(id, model.parameters())) == params
    after = results(model, *batch)
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def test_used_twice(counted, batch):
    ops, calls = counted
    model = random_model()
    state = state_of(model)
    use_kernels(model, ops)
    once = state_of(model)
    use_kernels(model, EAGER)
    assert state_of(model) == once
    model(batch[0], labels=batch[1])
    assert not any(calls.values()), "the first table"
    without_kernels(model)
    assert state_of(model) == state


def test_saved_as_theirs(tmp_path):
    model = with_kernels(random_model(), EAGER)
    model.save_pretrained(tmp_path)
    loaded = nn.Module.to(GPT2LMHeadModel.from_pretrained(tmp_path), DEVICE)
    assert loaded.config.architectures == ["GPT2LMHeadModel"] and loaded.config._attn_implementation == "sdpa"
    assert type(loaded) is GPT2LMHeadModel and torch.equal(call(loaded), call(random_model().eval()))


def test_another_model_of_the_same_config():
    theirs = random_model()
    model = nn.Module.to(GPT2LMHeadModel(with_kernels(theirs, EAGER).config), DEVICE)
    model.load_state_dict(theirs.state_dict())
    assert torch.equal(call(model.eval()), call(theirs.eval()))
