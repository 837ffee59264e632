"""GPT-2's encoding: every byte there and back, the ids of transformers' tokenizer, and a file that was changed."""

import json
import random
import shutil

import pytest

from data import tokenizer
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, gpt2_encoding, token_bytes, vocabulary_files

AWKWARD = [
    "",
    "Hello, world! It's 2024, isn't it? We'll see: they've said I'd know. 'SOME'REST 'some'rest",
    "  two spaces,\ttabs\t\t and trailing ones   ",
    "\r\n\n\n    indented\n\n \n",
    "Grüße, Ελλάδα, Привет, 世界, こんにちは, שלום, हिन्दी",
    "🌍🏳️‍🌈 e\u0301 \u00a0\u2003\u3000 \ufeff \x00\x07\x1b[0m \x7f\x85",
    "x" * 300 + "0123456789" * 10 + "!?" * 50,
    "def f(x):\n    return x**2  # ½ ² Ⅷ ٣",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' own implementation, on the same vocabulary files."""
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    for file, name in zip(vocabulary_files(), ("vocab.json", "merges.txt"), strict=True):
        shutil.copyfile(file, folder / name)
    return GPT2Tokenizer.from_pretrained(folder)


def random_texts(n: int) -> list[str]:
    """Words, blanks, punctuation and any code point that UTF-8 can carry, mixed."""
    rng = random.Random(11)
    pieces = ["the", " the", "ing", " ", "  ", "\n", "'s", "'LL", "12", ".", "...", "Ü", "中"]

    def piece() -> str:
        code = rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        return chr(code) if rng.random() < 0.3 else rng.choice(pieces)

    return ["".join(piece() for _ in range(rng.randrange(1, 60))) for _ in range(n)]


def test_every_byte_there_and_back():
    encoding, table = gpt2_encoding(), token_bytes()
    ids = [encoding.encode_single_token(bytes([value])) for value in range(256)]
    assert sorted(ids) == list(range(256))  # GPT-2's first 256 tokens are the bytes
    assert encoding.decode_bytes(ids) == b"".join(table[i] for i in ids) == bytes(range(256))


def test_ids_are_those_of_transformers_and_give_the_text_back(reference):
    table = token_bytes()
    for text in AWKWARD + random_texts(200):
        ids = gpt2_encoding().encode_ordinary(text)
        assert ids == reference.encode(text), repr(text)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert gpt2_encoding().decode(ids) == text


def test_vocabulary_is_that_of_the_file():
    printable, table = json.loads(vocabulary_files()[0].read_text(encoding="utf-8")), token_bytes()
    assert len(table) == len(printable) == VOCAB_SIZE == 50257
    assert table[END_OF_TEXT] == b"<|endoftext|>" and printable["<|endoftext|>"] == END_OF_TEXT == 50256
    # encoder.json shows bytes as printable characters, of which printable ASCII stands for itself.
    in_ascii = {text: i for text, i in printable.items() if all("!" <= c <= "~" for c in text)}
    assert len(in_ascii) > 10_000
    assert all(table[i] == text.encode() for text, i in in_ascii.items())


@pytest.mark.parametrize("which", [0, 1], ids=["encoder.json", "vocab.bpe"])
def test_file_that_was_changed_is_refused(tmp_path, monkeypatch, which):
    files = [shutil.copyfile(file, tmp_path / file.name) for file in vocabulary_files()]
    content = bytearray(files[which].read_bytes())
    content[-5] ^= 1
    files[which].write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer, "vocabulary_files", lambda: tuple(files))
    with pytest.raises(ValueError, match=rf"(?s)Hash mismatch.*{files[which].name}"):
        gpt2_encoding.__wrapped__()  # what the cache stands before
