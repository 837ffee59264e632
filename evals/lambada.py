"""LAMBADA (Paperno et al. 2016, https://arxiv.org/abs/1606.06031): does the network know a passage's last word?

OpenAI's version of the test set, by the rule of lm-evaluation-harness (its task lambada_openai, version 1).
"""

import math
from pathlib import Path

from evals.read import json_lines
from evals.task import Item, Scores, Task, exp, row_of_text
from readers import Check

_FIELDS = {"text": Check("a string with a blank in it", lambda value: isinstance(value, str) and " " in value)}


class Lambada(Task):
    """Passages whose items have one row, in which the last word is scored."""

    def figures(self, scores: Scores) -> dict[str, float]:
        """perplexity: per word; acc: the share of passages where each token of the last word is the likeliest."""
        found = [score for item in scores for score in item]
        mean = math.fsum(score.log_likelihood for score in found) / len(found)
        return {"perplexity": exp(-mean), "acc": sum(score.greedy for score in found) / len(found)}


def open_lambada(path: Path, limit: int | None = None) -> Lambada:
    """Read passages from the field `text` of JSON lines. The last word is what follows the last blank.

    Raises:
        BadInput: the file cannot be read, or a line is no passage.
    """
    items: list[Item] = []
    for _, record in json_lines(path, _FIELDS, limit):
        context, _, word = record["text"].rpartition(" ")
        items.append((row_of_text(context, f" {word}"),))
    return Lambada("lambada", "lm-eval", items)
