"""Evaluations by name: for the command line, and for train.py's --evals."""

from collections.abc import Callable
from pathlib import Path

import torch

from common import BadInput, print0
from data.prepare import prepare_pydoc
from data.shards import shard_pattern
from data.tokenizer import VOCAB_SIZE
from evals import read
from evals.hellaswag import open_hellaswag
from evals.lambada import open_lambada
from evals.perplexity import open_bpb, open_wikitext
from evals.score import score_items
from evals.task import Task
from model.gpt import GPT, GPTConfig
from training import distributed
from training.distributed import World

NAMES = ("hellaswag", "lambada", "wikitext", "bpb")


def open_task(
    name: str, data: str | None, config: GPTConfig, world: World, rule: str = "llm.c", limit: int | None = None
) -> Task:
    """An evaluation with its items. Every rank takes part.

    Args:
        name: one of NAMES.
        data: its file, or for bpb a glob of shards; None for the one that is downloaded, or for bpb for the embedded
            corpus's validation shards.
        config: shape of the network that will be evaluated.
        world: the ranks; one downloads, all read.
        rule: of HellaSwag.
        limit: most questions, passages, articles or documents; None for all.

    Raises:
        BadInput: the file cannot be had or used, or the network cannot be evaluated by it.
    """
    if config.vocab_size != VOCAB_SIZE:
        raise BadInput(
            f"the model has a vocabulary of {config.vocab_size} tokens, and evaluations need GPT-2's {VOCAB_SIZE}; "
            "name another"
        )
    if name == "bpb":
        if data is None:
            distributed.on_main(world, prepare_pydoc)
            data = shard_pattern(prepare_pydoc(), "val")
        task: Task = open_bpb(data, config.block_size, limit)
    else:
        path = Path(distributed.on_main(world, lambda: read.fetch(name)) if data is None else data)
        if name == "hellaswag":
            task = open_hellaswag(path, rule, limit)
        elif name == "lambada":
            task = open_lambada(path, limit)
        else:
            task = open_wikitext(path, config.block_size, limit)
    if not task.items:
        raise BadInput(f"{data} has nothing to score; name another file")
    most = max(row.n_scored for item in task.items for row in item)
    if most > config.block_size:
        raise BadInput(
            f"{name} scores {most} tokens at once, and the model takes {config.block_size}; name one with a larger "
            "block_size"
        )
    return task


def told(figures: dict[str, float]) -> str:
    """Figures for the screen."""
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


class Evaluations:
    """The evaluations that train.py makes as it goes.

    Args:
        spec: `--evals`, as in "hellaswag,bpb=notes.txt".
        config: shape of the network.
        world: the ranks.

    Raises:
        BadInput: see `open_task`; or there is no evaluation of that name.
    """

    def __init__(self, spec: str, config: GPTConfig, world: World):
        self.world = world
        self.tasks = []
        for word in filter(None, spec.split(",")):
            name, _, data = word.partition("=")
            if name not in NAMES:
                raise BadInput(f"--evals {spec}: no evaluation is called {name!r}; choose from {', '.join(NAMES)}")
            try:
                self.tasks.append(open_task(name, data or None, config, world))
            except BadInput as error:
                raise BadInput(f"--evals {spec}: {error}") from error

    def run(
        self, gpt: GPT, autocast: torch.autocast, n_tokens: int, step: int, at: Callable[[int, str], None]
    ) -> dict[str, dict[str, float]]:
        """Figures by task, on every rank, each printed as soon as it is there. Every rank takes part.

        Args:
            gpt: the network, which may be sharded.
            autocast: the context of forward passes.
            n_tokens: most tokens of a batch.
            step: updates done.
            at: told the step and what is being done before each batch, on every rank as often as on the others.
        """
        found = {}
        for task in self.tasks:
            at(step, f"evaluation: {task.name}")
            scores = score_items(gpt, task, self.world, autocast, n_tokens, keep=lambda _: at(step, "evaluation"))
            found[task.name] = task.figures(scores)
            print0(f"{task.name}: {told(found[task.name])}")
        return found
