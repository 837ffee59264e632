"""How well a network predicts text: WikiText's perplexity per word, and bits per byte of any text or of shards.

Documents are cut into windows as in lm-evaluation-harness; see `task.windows`.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import BadInput
from data.prepare import LINES_SUFFIXES, Document, tokenise_task
from data.shards import find_shards, open_shard
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, token_bytes
from evals.read import json_lines, read_member, read_text
from evals.task import Scores, Task, exp, windows
from readers import Check

WIKITEXT_MEMBER = "wikitext-2-raw/wiki.test.raw"
_FIELDS = {"text": Check("a string", lambda value: isinstance(value, str))}


@dataclass(frozen=True)
class Perplexity(Task):
    """Windows of documents. An item has one row."""

    n_bytes: int
    """of the text, in UTF-8"""
    n_words: int | None = None
    """None where words are not counted"""

    def facts(self) -> list[Any]:
        return [self.n_bytes, self.n_words]

    def figures(self, scores: Scores) -> dict[str, float]:
        """bits_per_byte, token_perplexity and, where words are counted, word_perplexity."""
        nats = -math.fsum(score.log_likelihood for item in scores for score in item)
        n_tokens = sum(row.n_scored for item in self.items for row in item)
        of_words = {} if self.n_words is None else {"word_perplexity": exp(nats / self.n_words)}
        return of_words | {
            "token_perplexity": exp(nats / n_tokens),
            "bits_per_byte": nats / math.log(2) / self.n_bytes,
        }


def open_wikitext(path: Path, block_size: int, limit: int | None = None) -> Perplexity:
    """Read the articles of a raw WikiText file, or of the zip archive in which it comes.

    By the rule of lm-evaluation-harness (its task wikitext, version 2): what the network reads has WikiText's spacing
    undone; words and bytes are counted before that.

    Args:
        path: `wiki.test.raw`, or an archive with it.
        block_size: most tokens that the network takes.
        limit: most articles.

    Raises:
        BadInput: the file cannot be read, or has no article.
    """
    text = read_member(path, WIKITEXT_MEMBER) if path.suffix == ".zip" else read_text(path)
    articles = list(_articles(text))[:limit]
    if not articles:
        raise BadInput(f"{path}: no line like ' = Title = ' begins an article; name WikiText's wiki.test.raw")
    documents = [Document(f"{path}, article {i}", _undo_spacing(article)) for i, article in enumerate(articles)]
    items = [item for tokens in _tokens_of_documents(documents) for item in windows(tokens, block_size)]
    n_bytes = sum(len(article.encode()) for article in articles)
    return Perplexity("wikitext", "lm-eval", items, n_bytes, sum(len(re.split(r"\s+", a)) for a in articles))


def open_bpb(source: str, block_size: int, limit: int | None = None) -> Perplexity:
    """Read text, or shards of tokens. Each document is scored after end-of-text, which is not scored itself.

    Args:
        source: a text file; a file of JSON lines with a field `text`; or a glob of shards, `*.bin`. A shard's documents
            are what is between its ends of text, so the same text gives the same figures.
        block_size: most tokens that the network takes.
        limit: most documents.

    Raises:
        BadInput: the files cannot be read, or have nothing to score.
    """
    documents = _tokens_of_shards(source) if source.endswith(".bin") else _tokens_of_documents(_documents(Path(source)))
    n_bytes_of = np.array([len(content) for content in token_bytes()])
    items, n_bytes = [], 0
    for i, tokens in enumerate(documents):
        if i == limit:
            break
        items += windows(tokens, block_size)
        n_bytes += int(n_bytes_of[tokens[1:]].sum())
    if not items:
        raise BadInput(f"{source} has no tokens to score; name another file")
    return Perplexity("bpb", "documents after end-of-text", items, n_bytes)


def _articles(text: str) -> Iterator[str]:
    """The articles of raw WikiText, each from the line of its title to the next title.

    A title has one equals sign on each side; headings of sections have more. What is before the first title is an
    article of its own, if it is more than blanks.
    """
    lines: list[str] = []
    started = False
    for line in text.split("\n"):
        joined = line.replace("= = =", "===").replace("= =", "==").strip()
        if joined.startswith("= ") and joined.endswith(" ="):
            if "".join(lines).strip():
                yield "\n".join(lines)
            lines, started = [], True
        lines.append(line)
    if started:
        yield "\n".join(lines)


# WikiText sets blanks around punctuation, and @ around what is inside a number. The order is part of the rule.
_REPLACED: tuple[tuple[str | re.Pattern, str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),  # hardly ever matches, and belongs to the rule
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def _undo_spacing(article: str) -> str:
    """An article as lm-evaluation-harness has the network read it."""
    for found, instead in _REPLACED:
        article = article.replace(found, instead) if isinstance(found, str) else found.sub(instead, article)
    return article


def _documents(path: Path) -> Iterator[Document]:
    if path.suffix.lower() in LINES_SUFFIXES:
        for where, record in json_lines(path, _FIELDS):
            yield Document(where, record["text"])
    else:
        yield Document(str(path), read_text(path))


def _tokens_of_documents(documents: Iterable[Document]) -> Iterator[np.ndarray]:
    for document in documents:
        yield tokenise_task([document])[1]


def _tokens_of_shards(pattern: str) -> Iterator[np.ndarray]:
    """The documents of all shards, each after end-of-text. One that a shard's end cuts is two."""
    for file in find_shards(pattern):
        tokens = open_shard(file)
        if len(tokens) and int(tokens.max()) >= VOCAB_SIZE:
            raise BadInput(f"{file} has the token {tokens.max()}, beyond GPT-2's vocabulary of {VOCAB_SIZE}")
        starts = np.flatnonzero(tokens == END_OF_TEXT)
        if len(tokens) and tokens[0] != END_OF_TEXT:
            yield np.concatenate([np.array([END_OF_TEXT], np.uint16), tokens[: starts[0] if len(starts) else None]])
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            yield tokens[start:end]
