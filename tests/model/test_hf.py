"""transformers: the same logits on both sides, and every difference refused by name."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common import BadInput
from data.tokenizer import gpt2_encoding
from kernels.ops import SDPA
from model import hf, llmc
from model.gpt import GPT, GPTConfig

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 61, "n_positions": 24}
NO_IDS = {"bos_token_id": None, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def random_hf(**sizes) -> GPT2LMHeadModel:
    """Of random weights, with biases and gains that are not 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
        with torch.no_grad():
            for name, param in theirs.named_parameters():
                if name.endswith("bias") or ".ln_" in name:
                    param.normal_(0.3, 0.2)
                else:
                    param.normal_(0.0, 0.3)
    return theirs


def random_gpt(config: GPTConfig) -> GPT:
    gpt = GPT(config, init=False)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for param in gpt.parameters():
            param.normal_(0.1, 0.2, generator=generator)
    return gpt


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("hf") / "small"
    random_hf(**SMALL, **NO_IDS).save_pretrained(folder)
    return folder


@pytest.fixture
def altered(small, tmp_path):
    """A copy of the small folder with other tensors or another configuration."""

    def alter(tensors=None, **config) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(small, folder)
        if tensors:
            state = load_file(folder / "model.safetensors")
            save_file(tensors(state) or state, folder / "model.safetensors", metadata={"format": "pt"})
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | config))
        return folder

    return alter


@torch.no_grad()
def assert_same_logits(gpt: GPT, theirs: GPT2LMHeadModel, atol: float = 1e-4) -> None:
    T = min(gpt.config.block_size, 24)
    ids = torch.randint(gpt.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    logits, _ = gpt(ids, ids)
    assert logits.std() > 0.1, "too flat to tell anything"
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=atol)


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as refused:
        hf.from_pretrained(str(folder))
    line = str(refused.value)
    assert str(folder) in line and "; " in line, line
    return line


# In


def test_same_logits_from_a_folder(small, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.model_info", fail)
    gpt = hf.from_pretrained(str(small), SDPA)
    assert gpt.config == GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=2, n_embd=16)
    assert gpt.ops is SDPA and gpt.lm_head.weight is gpt.transformer.wte.weight
    assert_same_logits(gpt, GPT2LMHeadModel.from_pretrained(small))


def without_prefix(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def with_buffers(state):
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def with_head(state):
    return state | {"lm_head.weight": state["transformer.wte.weight"].clone()}


@pytest.mark.parametrize(
    "tensors",
    [without_prefix, with_buffers, lambda state: without_prefix(with_buffers(state)), with_head],
    ids=["no-prefix", "buffers", "no-prefix-and-buffers", "head-as-well"],
)
def test_ways_to_save_the_same_network(small, altered, tensors):
    state = hf.from_pretrained(str(altered(tensors))).state_dict()
    for name, tensor in hf.from_pretrained(str(small)).state_dict().items():
        assert torch.equal(state[name], tensor), name


def without(name, then=lambda state: state):
    return lambda state: then({key: tensor for key, tensor in state.items() if key != name})


def with_tensor(name, tensor):
    return lambda state: state | {name: tensor}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (without("transformer.h.1.mlp.c_fc.bias"), "missing: transformer.h.1.mlp.c_fc.bias"),
        (without("transformer.h.1.ln_2.weight", without_prefix), "missing: transformer.h.1.ln_2.weight"),
        (without("transformer.wte.weight"), "transformer.wte.weight"),
        (with_tensor("transformer.h.0.attn.gate", torch.ones(3)), "unexpected: transformer.h.0.attn.gate"),
        (with_tensor("transformer.h.2.ln_1.weight", torch.ones(16)), "unexpected: transformer.h.2.ln_1.weight"),
        (with_tensor("transformer.h.0.attn.c_attn.weight", torch.ones(48, 16)), "transformer.h.0.attn.c_attn.weight"),
        (with_tensor("transformer.wte.weight", torch.ones(60, 16)), "another shape: transformer.wte.weight"),
        (with_tensor("transformer.wpe.weight", torch.ones(25, 16)), "another shape: transformer.wpe.weight"),
        (with_tensor("lm_head.weight", torch.ones(61, 16)), "lm_head.weight differs from transformer.wte.weight"),
    ],
)
def test_tensors_that_are_not_ours(altered, tensors, told):
    assert told in refusal(altered(tensors))


@pytest.mark.parametrize(
    "config",
    [
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 32},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"model_type": "gpt_neo"},
        {"n_head": 3},
    ],
    ids=lambda config: "-".join(map(str, *config.items())),
)
def test_configuration_that_is_not_ours(altered, config):
    assert next(iter(config)) in refusal(altered(**config))


@pytest.mark.parametrize("config", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 64}])
def test_configuration_that_is_ours_in_other_words(altered, config):
    folder = altered(**config)
    assert_same_logits(hf.from_pretrained(str(folder)), GPT2LMHeadModel.from_pretrained(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", 200 * b"x"])
def test_broken_folder(altered, file, content):
    path = altered() / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert "cannot load this folder" in refusal(path.parent)


def test_hub_that_cannot_be_reached():
    with pytest.raises(BadInput) as refused:
        hf.from_pretrained("nobody/a-model-that-is-not-cached")
    line = str(refused.value)
    assert line.startswith("nobody/a-model-that-is-not-cached: ") and "local folder" in line and "d12" in line


@pytest.mark.parametrize(("name", "asked"), [("gpt2", "openai-community/gpt2"), ("some/model", "some/model")])
def test_unreachable_hub_is_asked_once(monkeypatch, tmp_path, name, asked):
    """transformers, left to itself, retries for half a minute."""
    import huggingface_hub.constants

    names = []

    def unreachable(name, timeout):
        names.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(BadInput, match="no route to host"):
        hf.from_pretrained(name)
    assert names == [asked] and time.monotonic() - started < 5


# Out


WITH_VOCABULARY = GPTConfig(block_size=32, vocab_size=50257, n_layer=2, n_head=2, n_embd=16)
WITHOUT = GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=2, n_embd=16)


def run_directory(path: Path, config: GPTConfig) -> GPT:
    gpt = random_gpt(config)
    path.mkdir()
    llmc.write_model(path / "model.bin", gpt)
    return gpt


def load_exported(folder: Path) -> GPT2LMHeadModel:
    loaded: Any = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    theirs, report = loaded
    assert not any(report.values()), report
    return theirs.eval()


def test_export_is_taken_as_it_is(tmp_path, capsys):
    gpt = run_directory(tmp_path / "run", WITH_VOCABULARY)
    folder = tmp_path / "exports" / "mine"
    hf.main(["export", str(tmp_path / "run"), str(folder)])
    out = capsys.readouterr().out
    assert f"GPT2LMHeadModel.from_pretrained({str(folder)!r})" in out and "AutoTokenizer" in out
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]

    theirs = load_exported(folder)
    assert_same_logits(gpt, theirs)
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    assert theirs.config.n_positions == 32 and theirs.config.architectures == ["GPT2LMHeadModel"]
    assert (theirs.config.attn_pdrop, theirs.config.resid_pdrop, theirs.config.embd_pdrop) == (0, 0, 0)
    generation = theirs.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (50256, 50256)
    assert theirs.generate(torch.tensor([[50256]]), max_new_tokens=3, do_sample=False).shape[0] == 1

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 32 and tokenizer.eos_token_id == 50256 and len(tokenizer) == 50257
    for text in ["Hello, world", "  two  spaces\n\n\ttab ", "Grüße 世界 🌍", "don't 12345 x=f(y)", "a<|endoftext|>b"]:
        ids = gpt2_encoding().encode(text, allowed_special="all")
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_export_without_gpt2s_vocabulary_has_no_tokenizer(tmp_path, capsys):
    """Of a model file, and back."""
    gpt = run_directory(tmp_path / "run", WITHOUT)
    (tmp_path / "folder").mkdir()  # an empty one will do
    hf.main(["export", str(tmp_path / "run" / "model.bin"), str(tmp_path / "folder")])
    out = capsys.readouterr().out
    assert "no tokenizer" in out and "AutoTokenizer" not in out
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert load_exported(tmp_path / "folder").generation_config.eos_token_id is None
    again = hf.from_pretrained(str(tmp_path / "folder"))
    assert again.config == gpt.config
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_to_hf_is_a_copy_and_draws_nothing():
    gpt = random_gpt(WITHOUT)
    rng = torch.get_rng_state()
    theirs = hf.to_hf(gpt)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not theirs.training
    assert_same_logits(gpt, theirs)
    before = gpt.transformer.wte.weight.detach().clone()
    with torch.no_grad():
        for param in theirs.parameters():
            param.zero_()
    assert torch.equal(gpt.transformer.wte.weight, before) and torch.all(theirs.lm_head.weight == 0)


def export_refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stopped:
        hf.main(["export", *map(str, args)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model.hf: ")
    return line


def test_export_overwrites_nothing(tmp_path, capsys):
    run_directory(tmp_path / "run", WITHOUT)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert "notes is not empty" in export_refused(capsys, tmp_path / "run", tmp_path / "notes")
    assert "mine.txt is a file" in export_refused(capsys, tmp_path / "run", tmp_path / "notes" / "mine.txt")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "run"]


def test_export_of_nothing(tmp_path, capsys):
    line = export_refused(capsys, tmp_path / "no_run", tmp_path / "exports" / "mine")
    assert str(tmp_path / "no_run") in line
    assert list(tmp_path.iterdir()) == []


def test_export_command_line(capsys):
    assert "--help" in export_refused(capsys, "only-one")


@pytest.mark.parametrize("how", ["system", "safetensors"])
def test_failed_export_leaves_nothing(tmp_path, capsys, monkeypatch, how):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        if how == "system":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    run_directory(tmp_path / "run", WITH_VOCABULARY)
    # The weights are written by then, or about to be.
    monkeypatch.setattr(*((hf.shutil, "copyfile", full) if how == "system" else (hf, "to_hf", full)))
    line = export_refused(capsys, tmp_path / "run", tmp_path / "exports" / "mine")
    assert f"cannot write {tmp_path / 'exports' / 'mine'}" in line and "No space left" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, capsys):
    llmc.write_model(tmp_path / "model.bin", GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4)))
    monkeypatch.setattr(hf, "to_hf", lambda gpt: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        hf.main(["export", str(tmp_path / "model.bin"), str(tmp_path / "out")])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "model.hf: stopped by SIGTERM\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
