"""llm.c's files, byte by byte: written by this project, read by it and by tests/formats.py; and what is refused."""

import dataclasses
import errno
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from common import BadInput
from data.tokenizer import END_OF_TEXT, gpt2_encoding, token_bytes
from kernels.ops import EAGER, SDPA
from model import llmc
from model.gpt import GPT, GPTConfig
from tests import formats

CONFIGS = {
    "gpt2's vocabulary": GPTConfig(block_size=6, vocab_size=50257, n_layer=3, n_head=2, n_embd=4),
    "a multiple of 128": GPTConfig(block_size=9, vocab_size=256, n_layer=2, n_head=3, n_embd=12),
    "one row more": GPTConfig(block_size=9, vocab_size=129, n_layer=1, n_head=1, n_embd=8),
}
SMALL = CONFIGS["one row more"]
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_gpt(config: GPTConfig = SMALL, ops=EAGER) -> GPT:
    """A network in which no two tensors are alike, so that none can stand in another's place."""
    gpt = GPT(config, ops, init=False)
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for param in gpt.parameters():
            param.normal_(0.0, 0.4, generator=generator)
    return gpt


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, shapes and bits, all in fp32."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype == np.float32
        np.testing.assert_array_equal(found[name].view("u4"), values.view("u4"), err_msg=name, strict=True)


def nearest_even(values: np.ndarray) -> np.ndarray:
    """fp32 without the digits that bf16 lacks, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)


# Model files


@configs
def test_float32_file(tmp_path, config):
    gpt = random_gpt(config)
    llmc.write_model(tmp_path / "model.bin", gpt)
    assert struct.unpack("<2i", (tmp_path / "model.bin").read_bytes()[:8]) == (20240326, 3)
    network, tensors = formats.model(tmp_path / "model.bin")
    assert network == dataclasses.astuple(config)
    assert_same_arrays(tensors, arrays(dict(gpt.named_parameters())))

    read_config, state = llmc.read_model(tmp_path / "model.bin")
    assert read_config == config
    assert state.keys() == gpt.state_dict().keys()
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_bfloat16_file_is_rounded_to_nearest_even(tmp_path):
    gpt = random_gpt()
    # Ties that go down and up to even, their neighbours, signed zero, a subnormal, and values that round to another
    # power of two.
    awkward = [
        0x3F808000,
        0x3F818000,
        0x3F807FFF,
        0x3F808001,
        0x80000000,
        0x00008000,
        0x00018000,
        0x3FFFFFFF,
        0xBF808000,
    ]
    with torch.no_grad():
        gpt.transformer.wte.weight.view(-1)[: len(awkward)] = torch.from_numpy(np.array(awkward, "<u4").view("<f4"))
    llmc.write_model(tmp_path / "model.bin", gpt, torch.bfloat16)
    assert struct.unpack("<2i", (tmp_path / "model.bin").read_bytes()[:8]) == (20240326, 5)
    expected = {name: nearest_even(param) for name, param in arrays(dict(gpt.named_parameters())).items()}
    assert_same_arrays(formats.model(tmp_path / "model.bin")[1], expected)

    read_config, state = llmc.read_model(tmp_path / "model.bin")
    assert read_config == SMALL
    assert_same_arrays(arrays({name: state[name] for name in expected}), expected)


def test_config_and_state_dict_write_the_same_file(tmp_path):
    gpt = random_gpt()
    llmc.write_model(tmp_path / "a.bin", gpt)
    llmc.write_model(tmp_path / "b.bin", (gpt.config, gpt.state_dict()))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_load_model_from_a_file_and_from_a_run_directory(tmp_path):
    gpt = random_gpt()
    llmc.write_model(tmp_path / "model.bin", gpt)
    ids = torch.arange(8).view(1, 8)
    for path in (tmp_path / "model.bin", tmp_path, str(tmp_path)):
        loaded = llmc.load_model(path, SDPA)
        assert loaded.config == gpt.config and loaded.ops is SDPA
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        torch.testing.assert_close(loaded(ids)[0], gpt(ids)[0])


# Debug state


def first_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SMALL.vocab_size, (3, 8), generator=torch.Generator().manual_seed(2))
    x, y = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    y[1, 2] = -1
    return x, y


def test_debug_state_file(tmp_path):
    gpt, (x, y) = random_gpt(), first_batch()
    llmc.write_debug_state(tmp_path / "state.bin", gpt.config, llmc.debug_state(gpt, x, y))
    logits, loss = gpt(x, y)
    loss.backward()

    found = formats.debug_state(tmp_path / "state.bin", formats.Network(*dataclasses.astuple(SMALL)))
    assert np.array_equal(found.x, x) and np.array_equal(found.y, y)
    assert np.array_equal(found.logits, logits.detach()) and found.loss == loss.item()
    grads = {name: param.grad for name, param in gpt.named_parameters()}
    assert_same_arrays(found.grads, arrays(grads))

    state = llmc.read_debug_state(tmp_path / "state.bin", SMALL)
    assert torch.equal(state.x, x) and torch.equal(state.y, y) and state.x.dtype == torch.int64
    assert torch.equal(state.logits, logits) and torch.equal(state.loss, loss)
    assert state.grads.keys() == grads.keys()
    assert all(torch.equal(state.grads[name], grad) for name, grad in grads.items())


def test_debug_state_is_eager_and_fp32_whatever_the_run_uses():
    def broken(x):
        raise AssertionError("the ops of the run were called")

    x, y = first_batch()
    expected = llmc.debug_state(random_gpt(), x, y)
    precisions = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: precisions.append(torch.backends.cuda.matmul.fp32_precision)
    )
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # after both, torch's older getter raises; conftest puts it back
    try:
        with torch.autocast("cpu", torch.bfloat16):
            state = llmc.debug_state(random_gpt(ops=EAGER._replace(gelu=broken)), x, y)
    finally:
        hook.remove()
    assert torch.equal(state.logits, expected.logits) and state.logits.dtype == torch.float32
    assert all(torch.equal(grad, expected.grads[name]) for name, grad in state.grads.items())
    assert set(precisions) == {"ieee"} and torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("has_gradients", [False, True])
def test_debug_state_leaves_the_run_as_it_was(has_gradients):
    gpt, (x, y) = random_gpt(), first_batch()
    if has_gradients:
        gpt(x, y)[1].backward()
    weights = {name: param.detach().clone() for name, param in gpt.named_parameters()}
    grads = {name: param.grad if param.grad is None else param.grad.clone() for name, param in gpt.named_parameters()}
    rng = torch.get_rng_state()
    llmc.debug_state(gpt, x, y)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, param in gpt.named_parameters():
        assert torch.equal(param, weights[name])
        assert torch.equal(param.grad, grads[name]) if has_gradients else param.grad is None


# Tokenizer


def test_tokenizer_file_decodes_every_byte(tmp_path):
    path = tmp_path / "gpt2_tokenizer.bin"
    llmc.write_tokenizer(path, token_bytes(), END_OF_TEXT)
    table, end_of_text = formats.tokenizer(path)
    assert (len(table), end_of_text) == (50257, 50256) and table[50256] == b"<|endoftext|>"

    encoding = gpt2_encoding()
    every_byte = [encoding.encode_single_token(bytes([value])) for value in range(256)]
    text = "Grüße, 世界 🌍\n\tdef f(x):\r\n        return x\x00\x7f"
    ids = every_byte + encoding.encode(text)
    assert b"".join(table[token] for token in ids) == bytes(range(256)) + text.encode()
    assert llmc.read_tokenizer(path) == (table, 50256)


@pytest.mark.parametrize(
    ("tokens", "end_of_text", "told"),
    [
        ([b"a", b""], 0, "token 1 has 0 bytes"),
        ([b"a", 256 * b"a"], 0, "token 1 has 256 bytes"),
        ([b"a"], 1, "end_of_text 1"),
        ([b"a"], -1, "end_of_text -1"),
    ],
)
def test_tokens_that_do_not_fit(tmp_path, tokens, end_of_text, told):
    with pytest.raises(ValueError, match=told):
        llmc.write_tokenizer(tmp_path / "tokenizer.bin", tokens, end_of_text)
    assert list(tmp_path.iterdir()) == []


def test_longest_token_that_fits(tmp_path):
    llmc.write_tokenizer(tmp_path / "tokenizer.bin", [255 * b"a", b"b"], 1)
    assert llmc.read_tokenizer(tmp_path / "tokenizer.bin") == ([255 * b"a", b"b"], 1)


# Bad input


def write_state(path: Path) -> None:
    llmc.write_debug_state(path, SMALL, llmc.debug_state(random_gpt(), *first_batch()))


WRITERS = {
    "model": (lambda path: llmc.write_model(path, random_gpt()), llmc.load_model),
    "bf16": (lambda path: llmc.write_model(path, random_gpt(), torch.bfloat16), llmc.read_model),
    "state": (write_state, lambda path: llmc.read_debug_state(path, SMALL)),
    "tokenizer": (lambda path: llmc.write_tokenizer(path, [b"a", b"bc", b"def"], 2), llmc.read_tokenizer),
}
kinds = pytest.mark.parametrize("kind", WRITERS)


def refusal(read, path: Path) -> str:
    with pytest.raises(BadInput) as refused:
        read(path)
    line = str(refused.value)
    assert str(path) in line and "\n" not in line and "; " in line, line
    return line


def with_header(path: Path, **entries: int) -> None:
    content = bytearray(path.read_bytes())
    for index, value in entries.items():
        struct.pack_into("<i", content, 4 * int(index.removeprefix("at")), value)
    path.write_bytes(content)


@kinds
def test_file_that_is_not_there(tmp_path, kind):
    assert "No such file" in refusal(WRITERS[kind][1], tmp_path / "nothing.bin")


def test_run_directory_without_weights(tmp_path):
    with pytest.raises(BadInput, match=r"model\.bin.*name a model file or a run directory"):
        llmc.load_model(tmp_path)


@kinds
def test_file_of_another_kind(tmp_path, kind):
    write, read = WRITERS[kind]
    path = tmp_path / "file.bin"
    write(path)
    with_header(path, at0=20240520)
    assert "magic number 20240520" in refusal(read, path)
    write(path)
    with_header(path, at1=4)
    assert "version 4" in refusal(read, path)


@kinds
def test_truncated_file(tmp_path, kind):
    write, read = WRITERS[kind]
    path = tmp_path / "file.bin"
    write(path)
    whole = path.read_bytes()
    for there in (len(whole) - 1, 1024, 1023, 0):
        path.write_bytes(whole[:there])
        line = refusal(read, path)
        assert "cut short" in line and f"{there} bytes" in line
        if there >= 1024 and kind != "tokenizer":  # a tokenizer's header counts tokens, not bytes
            assert str(len(whole)) in line
    path.write_bytes(whole + b"\x01a")
    assert "longer than its header says" in refusal(read, path)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"at5": 3}, "n_embd 8 is no multiple of n_head 3"),
        ({"at4": 0}, "n_layer is 0"),
        ({"at3": -1}, "vocab_size is -1"),
        ({"at7": 128}, "padded vocabulary 128"),
        ({"at7": 129}, "padded vocabulary 129"),
        ({"at4": 2**31 - 1}, "must be at most 1024"),  # refused before anything of that size is made
    ],
)
def test_impossible_model_header(tmp_path, entries, told):
    path = tmp_path / "model.bin"
    llmc.write_model(path, random_gpt())
    with_header(path, **entries)
    assert told in refusal(llmc.read_model, path)


def test_impossible_header_of_a_state(tmp_path):
    write_state(tmp_path / "state.bin")
    with_header(tmp_path / "state.bin", at2=0)
    assert "B 0" in refusal(WRITERS["state"][1], tmp_path / "state.bin")


@pytest.mark.parametrize(
    ("entries", "told"),
    [({"at3": 3}, "end-of-text 3"), ({"at2": -5}, "-5 tokens"), ({"at2": 4}, "cut short"), ({"at256": 0}, "no bytes")],
)
def test_impossible_tokenizer(tmp_path, entries, told):
    path = tmp_path / "tokenizer.bin"
    llmc.write_tokenizer(path, [b"a", b"bc", b"def"], 2)
    with_header(path, **entries)
    assert told in refusal(llmc.read_tokenizer, path)


def test_state_of_another_network(tmp_path):
    write_state(tmp_path / "state.bin")
    other = CONFIGS["a multiple of 128"]
    refusal(lambda path: llmc.read_debug_state(path, other), tmp_path / "state.bin")


@pytest.mark.parametrize("kind", ["model", "state"])
@pytest.mark.parametrize("before", [None, b"what stood there"])
def test_nothing_is_left_when_the_disk_fills_up(tmp_path, monkeypatch, kind, before):
    path = tmp_path / "file.bin"
    if before:
        path.write_bytes(before)
    plain, calls = llmc._to_bytes, []

    def fails_half_way(*args):
        calls.append(args)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)

    monkeypatch.setattr(llmc, "_to_bytes", fails_half_way)
    with pytest.raises(BadInput, match=f"cannot write {path}: No space left on device"):
        WRITERS[kind][0](path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


# Names


@pytest.mark.parametrize(
    ("model", "size"),
    [
        *[("gpt2", "124M"), ("gpt2-medium", "355M"), ("gpt2-large", "774M"), ("gpt2-xl", "1558M")],
        *[("openai-community/gpt2-xl", "1558M"), ("someone/their-gpt2", "their-gpt2")],
        *[("nano", "nano"), ("d12", "d12"), ("d24", "d24"), ("d36", "d36"), ("d48", "d48")],
        *[
            ("/data/gpt2_124M.bin", "124M"),
            ("gpt2_d12_bf16.bin", "d12"),
            ("my_net.bin", "my_net"),
            ("gpt2_.bin", "gpt2_"),
        ],
        *[("runs/tuesday/model.bin", "tuesday"), ("runs/tuesday", "tuesday"), ("runs/in_bf16/", "in_bf16")],
    ],
)
def test_size_name(model, size):
    assert llmc.size_name(model) == size


def test_size_name_of_the_folder_one_is_in(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert llmc.size_name(".") == "here" and llmc.size_name("model.bin") == "here"
