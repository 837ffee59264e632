"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings is the likeliest?

Two rules are in use, and give different figures: llm.c's (dev/data/hellaswag.py) and that of lm-evaluation-harness (its
task hellaswag, version 1). docs/evals.md states both.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import BadInput
from data.tokenizer import gpt2_encoding
from evals import eval_file
from evals.eval_file import N_ENDINGS, Question
from evals.read import json_lines
from evals.task import Item, Scores, Task, row, row_of_text
from readers import Check, either, integer, listed, one_of

RULES = ("llm.c", "lm-eval")

_TEXT = Check("a string", lambda value: isinstance(value, str))
_LABEL = either(integer(0, N_ENDINGS - 1), one_of(*map(str, range(N_ENDINGS))))  # some copies have it as a string
_FIELDS = {"endings": listed(_TEXT, N_ENDINGS, N_ENDINGS), "label": _LABEL}


@dataclass(frozen=True)
class HellaSwag(Task):
    """Questions whose items have a row for each ending."""

    labels: list[int]
    """which ending is right"""
    lengths: list[list[int]]
    """of the endings, by which acc_norm divides: tokens by llm.c's rule, characters by lm-eval's"""

    def facts(self) -> list[Any]:
        return [self.labels, self.lengths]

    def figures(self, scores: Scores) -> dict[str, float]:
        """acc: share of questions whose right ending has the highest log-likelihood; acc_norm: divided by length."""
        right, right_norm = (
            sum(choice == label for choice, label in zip(choices, self.labels, strict=True))
            for choices in zip(*self.choices(scores), strict=True)
        )
        return {"acc": right / len(self.labels), "acc_norm": right_norm / len(self.labels)}

    def choices(self, scores: Scores) -> list[tuple[int, int]]:
        """The endings that acc and acc_norm choose for each question; −1 where a score is no finite number."""
        found = []
        for of_item, lengths in zip(scores, self.lengths, strict=True):
            sums = [score.log_likelihood for score in of_item]
            means = [sum_ / length if length else -math.inf for sum_, length in zip(sums, lengths, strict=True)]
            found.append((_largest(sums), _largest(means)))
        return found


def _largest(values: Sequence[float]) -> int:
    """Place of the largest value, the first of several."""
    return -1 if any(map(math.isnan, values)) else max(range(len(values)), key=values.__getitem__)


def open_hellaswag(path: Path, rule: str = "llm.c", limit: int | None = None) -> HellaSwag:
    """Read HellaSwag from its JSON lines, or from llm.c's `.bin` file, which has the tokens of llm.c's rule alone.

    Raises:
        BadInput: it cannot be read, is not what it says, or does not go with the rule.
    """
    if rule == "lm-eval":
        if path.suffix == ".bin":
            raise BadInput(
                f"{path} has tokens by llm.c's rule and no text; for --rule lm-eval name hellaswag_val.jsonl, or leave "
                "--data out to download it"
            )
        return _by_lm_eval(path, limit)
    found = questions(path, limit)
    items = [tuple(row(question.context, ending) for ending in question.endings) for question in found]
    lengths = [[len(ending) for ending in question.endings] for question in found]
    return HellaSwag("hellaswag", rule, items, [question.label for question in found], lengths)


def questions(path: Path, limit: int | None = None) -> list[Question]:
    """The questions as llm.c has them: the context as it is, and each ending by itself, with a blank before it.

    Raises:
        BadInput: as in `open_hellaswag`.
    """
    if path.suffix == ".bin":
        return eval_file.read(path)[:limit]
    encode = gpt2_encoding().encode_ordinary
    found = []
    for where, record in json_lines(path, _FIELDS | {"ctx": _TEXT}, limit):
        context, *endings = [encode(record["ctx"]), *(encode(f" {ending}") for ending in record["endings"])]
        if not context:
            raise BadInput(f"{where}: ctx is empty; remove the line")
        found.append(Question(int(record["label"]), context, endings))
    return found


def _by_lm_eval(path: Path, limit: int | None) -> HellaSwag:
    fields = _FIELDS | dict.fromkeys(("activity_label", "ctx_a", "ctx_b"), _TEXT)
    items: list[Item] = []
    labels, lengths = [], []
    for _, record in json_lines(path, fields, limit):
        context = _clean(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
        endings = [_clean(ending) for ending in record["endings"]]
        items.append(tuple(row_of_text(context, f" {ending}") for ending in endings))
        labels.append(int(record["label"]))
        lengths.append([len(ending) for ending in endings])
    return HellaSwag("hellaswag", "lm-eval", items, labels, lengths)


def _clean(text: str) -> str:
    """Remove what WikiHow's pages left in the texts: titles in brackets, then double blanks."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def write_bin(path: Path, source: Path) -> int:
    """Write HellaSwag's questions as llm.c's `.bin` file. Returns how many there are.

    Raises:
        BadInput: the source cannot be used, or the file exists or cannot be written.
    """
    found = questions(source)
    eval_file.write(path, found)
    return len(found)
