"""Batches and windows: every token is scored once, after the context that the rules give it, whatever is beside it."""

import math

import numpy as np
import pytest
import torch

from evals.score import batches, score_items, score_rows
from evals.task import Row, Task, windows
from kernels.ops import EAGER
from model.llmc import load_model
from tests.evals.conftest import SMALL
from training.distributed import World

WORLD = World(0, 0, 1, torch.device("cpu"), False)
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def items_of(lengths, n_rows=1, seed=3):
    rng = np.random.default_rng(seed)
    return [tuple(Row(rng.integers(0, 50257, n).astype(np.uint16), 2) for _ in range(n_rows)) for n in lengths]


@pytest.mark.parametrize(("n_tokens", "n_rows"), [(1, 4), (40, 1), (300, 4), (10**6, 4)])
def test_batches(n_tokens, n_rows):
    items = items_of([5, 9, 33, 9, 6, 100, 4, 21, 21], n_rows)
    found = batches(items, 64, n_tokens)
    assert sorted(i for batch in found for i in batch) == list(range(9))
    assert found[0][0] == 5
    for batch in found:
        longest = max(min(64, len(items[i][0].tokens) - 1) for i in batch)
        assert len(batch) == 1 or len(batch) * n_rows * longest <= n_tokens
    assert (len(found) == 9) == (n_tokens == 1) and (len(found) == 1) == (n_tokens == 10**6)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 40])
def test_windows(n):
    """A block of 8. Each token once and in order; the first window after end-of-text, later ones after what fits."""
    tokens = np.array([50256, *range(n)], np.uint16)
    scored = []
    for k, (row,) in enumerate(windows(tokens, 8)):
        ids = row.tokens.tolist()
        scored += ids[-row.n_scored :]
        assert len(ids) <= 9 and row.n_scored <= 8
        if k == 0:
            assert ids == [50256, *range(min(n, 8))] and row.n_scored == min(n, 8)
        else:
            assert len(ids) == 9 and ids == list(range(ids[0], ids[0] + 9))
            assert row.n_scored == min(8, n - 8 * k)
    assert scored == list(range(n))
    assert windows(np.array([50256], np.uint16), 8) == []


def test_padding_and_a_lost_beginning_change_nothing(small):
    gpt = load_model(small, EAGER)
    rows = [item[0] for item in items_of([5, SMALL.block_size + 9, 33])]
    together = score_rows(gpt, rows, WORLD.device, NO_AUTOCAST)
    for row, score in zip(rows, together, strict=True):
        ids = torch.from_numpy(row.tokens[-SMALL.block_size - 1 :].astype("int64"))[None]
        with torch.no_grad():
            logits, _ = gpt(ids[:, :-1], ids[:, 1:])
        of_token = torch.log_softmax(logits[0].double(), -1)
        want = sum(of_token[-k, ids[0, -k]].item() for k in (1, 2))
        assert score.log_likelihood == pytest.approx(want, rel=1e-5)
    best = int(of_token[-1].argmax())
    greedy = Row(np.array([*rows[2].tokens[:-1], best], np.uint16), 1)
    assert score_rows(gpt, [greedy], WORLD.device, NO_AUTOCAST)[0].greedy
    assert not score_rows(gpt, [greedy._replace(n_scored=2)], WORLD.device, NO_AUTOCAST)[0].greedy


def test_the_head_runs_where_tokens_are_scored(small):
    gpt, shapes = load_model(small, EAGER), []
    gpt.lm_head.register_forward_hook(lambda module, args, logits: shapes.append(logits.shape))
    score_rows(gpt, [item[0] for item in items_of([5, 9, 33])], WORLD.device, NO_AUTOCAST)
    assert shapes == [(3 * 2, SMALL.vocab_size)]


def test_infinite_losses_are_no_numbers(small):
    gpt = load_model(small, EAGER)
    with torch.no_grad():
        gpt.transformer.ln_f.weight.zero_()
        gpt.transformer.ln_f.bias.fill_(1)
        gpt.transformer.wte.weight[7] = -1e38  # its logit is −∞
    row = Row(np.array([1, 2, 7], np.uint16), 1)
    (score,) = score_rows(gpt, [row], WORLD.device, NO_AUTOCAST)
    assert math.isnan(score.log_likelihood)


def test_each_item_gets_its_own_scores(small):
    gpt = load_model(small, EAGER)
    task = Task("bpb", "", items_of([9, 5, 12, 30], n_rows=2))
    found = score_items(gpt, task, WORLD, NO_AUTOCAST, 60)
    for item, scores in zip(task.items, found, strict=True):
        alone = score_rows(gpt, list(item), WORLD.device, NO_AUTOCAST)
        assert [s.log_likelihood for s in scores] == pytest.approx([s.log_likelihood for s in alone], rel=1e-6)
