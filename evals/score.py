"""Scores of items: in batches, shared by the ranks, and the same whatever the number of ranks."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.tokenizer import END_OF_TEXT
from evals.task import Item, Row, Score, Task
from model.gpt import GPT
from training import distributed
from training.distributed import World

Found = dict[int, list[Score]]
"""scores of items by their places in the task"""


def batches(items: list[Item], block_size: int, n_tokens: int) -> list[list[int]]:
    """Places of the items of each batch: longest first, which wastes the least on padding.

    They follow from the items alone, so that the same items meet in a batch on any number of ranks and after a restart:
    matmuls of another shape may round in another way.

    Args:
        items: all items of a task.
        block_size: most tokens of a row; longer ones will lose their beginnings.
        n_tokens: most tokens in a batch, with padding, unless a single item has more.
    """
    lengths = [min(block_size, max(len(row.tokens) - 1 for row in item)) for item in items]
    found: list[list[int]] = []
    n_rows = longest = 0
    for i in sorted(range(len(items)), key=lambda i: (-lengths[i], i)):
        if not found or (n_rows + len(items[i])) * longest > n_tokens:
            found.append([])
            n_rows, longest = 0, lengths[i]
        found[-1].append(i)
        n_rows += len(items[i])
    return found


@torch.no_grad()
def score_rows(gpt: GPT, rows: list[Row], device: torch.device, autocast: AbstractContextManager) -> list[Score]:
    """Scores of the rows of one batch, from one forward pass.

    A row that is longer than the network takes loses its beginning.
    """
    sequences = [torch.from_numpy(row.tokens[-gpt.config.block_size - 1 :].astype("int64")) for row in rows]
    idx = torch.nn.utils.rnn.pad_sequence([s[:-1] for s in sequences], batch_first=True, padding_value=END_OF_TEXT)
    positions, targets = [], []
    for row, sequence, of_row in zip(rows, sequences, torch.arange(idx.numel()).view_as(idx), strict=True):
        scored = slice(len(sequence) - 1 - row.n_scored, len(sequence) - 1)
        positions.append(of_row[scored])
        targets.append(sequence[1:][scored])
    with autocast:
        logits, _ = gpt(idx.to(device), positions=torch.cat(positions).to(device))
    assert logits is not None
    n_scored = [row.n_scored for row in rows]
    losses, greedy = [], []
    for of_row, ids in zip(logits.split(n_scored), torch.cat(targets).to(device).split(n_scored), strict=True):
        of_row = of_row.float()  # row by row: V is large
        losses.append(F.cross_entropy(of_row, ids, reduction="none"))
        greedy.append(of_row.argmax(-1) == ids)
    sums = [-part.double().sum().item() for part in torch.cat(losses).cpu().split(n_scored)]  # one wait for the device
    all_greedy = [bool(part.all()) for part in torch.cat(greedy).cpu().split(n_scored)]
    return [Score(x if math.isfinite(x) else math.nan, whole) for x, whole in zip(sums, all_greedy, strict=True)]


def score_items(
    gpt: GPT,
    task: Task,
    world: World,
    autocast: AbstractContextManager,
    n_tokens: int,
    done: Found | None = None,
    keep: Callable[[Found], None] = lambda found: None,
) -> list[list[Score]]:
    """Scores of all items of a task, on every rank. Every rank takes part in every forward pass.

    Args:
        gpt: the network, on the device; it may be sharded.
        task: what is scored.
        world: the ranks.
        autocast: the context of forward passes.
        n_tokens: most tokens of a batch; see `batches`.
        done: items that an interrupted evaluation has scored, the same on every rank. A batch is scored again unless
            all of it is there.
        keep: called on every rank with what the ranks have found, as soon as they have.
    """
    scores: Found = dict(done or {})
    planned = batches(task.items, gpt.config.block_size, n_tokens)
    todo = [batch for batch in planned if not all(i in scores for i in batch)]
    with tqdm(desc=task.name, total=len(task.items), disable=None if world.is_main else True, leave=False) as progress:
        progress.update(len(task.items) - sum(map(len, todo)))
        for start in range(0, len(todo), world.size):
            together = todo[start : start + world.size]
            # A rank without a batch of its own scores the last one too, because sharded weights need all ranks.
            mine = together[min(world.rank, len(together) - 1)]
            of_rows = iter(score_rows(gpt, [row for i in mine for row in task.items[i]], world.device, autocast))
            of_items = {i: [next(of_rows) for _ in task.items[i]] for i in mine}
            found = {i: item for of_rank in distributed.gather(world, of_items) for i, item in of_rank.items()}
            scores |= found
            keep(found)
            progress.update(sum(map(len, together)))
    return [scores[i] for i in range(len(task.items))]
