"""A small network with GPT-2's vocabulary, and what an evaluation leaves."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from data.tokenizer import gpt2_encoding
from evals.task import Score
from kernels.ops import EAGER
from model.gpt import GPT, GPTConfig
from model.llmc import write_model

SMALL = GPTConfig(block_size=160, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A model file with random weights, enlarged so that likelihoods differ by more than rounding."""
    gpt = GPT(SMALL, EAGER)
    with torch.no_grad():
        for param in gpt.parameters():
            if param.dim() == 2:
                param.mul_(20)
    path = tmp_path_factory.mktemp("small") / "gpt2_small.bin"
    write_model(path, gpt)
    return path


@torch.no_grad()
def known_passages(gpt: GPT, n: int) -> list[str]:
    """Passages whose last word, of one token, is the one that the network holds for the likeliest."""
    encoding = gpt2_encoding()
    found = []
    for k in itertools.count():
        context = f"The dog saw {k} roofs under the"
        ids = torch.tensor([encoding.encode_ordinary(context)])
        logits, _ = gpt(ids)
        text = context + encoding.decode([int(logits[0, -1].argmax())])
        word = text.removeprefix(context)
        whole = encoding.encode_ordinary(text)[ids.shape[1] :] == [int(logits[0, -1].argmax())]
        if whole and word.startswith(" ") and " " not in word.strip() and word.strip():
            found.append(text)
        if len(found) == n:
            return found
        assert k < 500, "the network holds no word for likely"
    raise AssertionError


def results_of(folder: Path) -> tuple[dict, list[list[Score]]]:
    """The results of the only evaluation in a folder, and the scores of all items."""
    (file,) = (path for path in folder.glob("*.json"))
    (lines,) = folder.glob("*.items.jsonl")
    records = [json.loads(line) for line in lines.read_text().splitlines()[1:]]
    scores = {r["item"]: [Score(math.nan if ll is None else ll, greedy) for ll, greedy in r["scores"]] for r in records}
    assert sorted(scores) == list(range(len(scores))) and len(records) == len(scores)
    return json.loads(file.read_text()), [scores[i] for i in range(len(scores))]
