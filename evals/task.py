"""What an evaluation asks of a network: log-likelihoods of tokens after other tokens. Tasks make figures of them."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.tokenizer import END_OF_TEXT, gpt2_encoding


class Row(NamedTuple):
    """Tokens for one sequence of a batch."""

    tokens: np.ndarray
    """(n,) uint16: a context of at least one token, and what is scored after it"""
    n_scored: int
    """number of tokens at the end that are scored"""


class Score(NamedTuple):
    """What the network says to a row."""

    log_likelihood: float
    """of the scored tokens, in nats; NaN if the network gave no finite number"""
    greedy: bool
    """whether each scored token is the likeliest at its place"""


Item = tuple[Row, ...]
"""what is scored together: the endings of a question, a passage, a window of text"""
Scores = Sequence[Sequence[Score]]
"""of all items, row by row"""


@dataclass(frozen=True)
class Task:
    """An evaluation by one rule."""

    name: str
    rule: str
    """what distinguishes its figures from those of the same name by another rule"""
    items: list[Item]

    def facts(self) -> list[Any]:
        """What `figures` needs besides the scores, such as labels, as JSON has it."""
        return []

    def figures(self, scores: Scores) -> dict[str, float]:
        """The results by name. Each task computes its own."""
        raise NotImplementedError

    def digest(self) -> str:
        """A SHA-256 sum over everything that decides the figures, but for the network."""
        sum_ = hashlib.sha256(json.dumps([self.name, self.rule, self.facts()]).encode())
        for item in self.items:
            sum_.update(b"item")
            for row in item:
                sum_.update(f"row {len(row.tokens)} {row.n_scored} ".encode() + row.tokens.astype("<u2").tobytes())
        return sum_.hexdigest()


def row(context: Sequence[int], scored: Sequence[int]) -> Row:
    """A row for scored tokens after a context; end-of-text stands in for an empty one."""
    return Row(np.array([*(context or [END_OF_TEXT]), *scored], np.uint16), len(scored))


def row_of_text(context: str, continuation: str) -> Row:
    """A row for a continuation of a context, whose tokens are divided as in lm-evaluation-harness.

    Blanks at the end of the context go to the continuation. The continuation's tokens are what comes after as many
    tokens as the context has by itself, in the tokens of both together.
    """
    encode = gpt2_encoding().encode_ordinary
    before = encode(context.rstrip())
    return row(before, encode(context + continuation)[len(before) :])


def windows(tokens: np.ndarray, block_size: int) -> list[Item]:
    """Cut a document into windows in which each of its tokens is scored once, as lm-evaluation-harness does.

    The first window has the first block_size tokens, after the token in front of them. Each later one has the next
    block_size tokens, with one token before them as context; the last takes so many more as its context as fit.

    Args:
        tokens: (1 + n,) uint16, end-of-text and the document.
        block_size: most tokens that the network takes.
    """
    found: list[Item] = []
    for start in range(1, len(tokens), block_size):
        end = min(start + block_size, len(tokens))
        found.append((Row(tokens[max(0, end - block_size - 1) : end], end - start),))
    return found


def exp(x: float) -> float:
    """eˣ, infinite where it does not fit a float."""
    return math.exp(x) if not x > 700 else math.inf
