"""What an evaluation leaves: scores as they are found, so that a killed one resumes, and then its results."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from common import UNFINISHED, BadInput, atomic_write, exclusive, write_errors
from evals.score import Found
from evals.task import Score, Task
from model.gpt import GPT
from readers import Check, either, integer, listed, number, one_of, open_regular, parse_json, require

LOG = "evals.jsonl"
"""file with a row for each evaluation whose results are in the folder"""
LONGEST = 1 << 30
"""bytes of a file of scores"""

_FINITE = number(-1e300, 1e300)
_SCORE = Check(
    "[a number or null, true or false]",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and either(_FINITE, one_of(None)).holds(value[0])
        and isinstance(value[1], bool)
    ),
)
_LINE = {"item": integer(), "scores": listed(_SCORE, 1)}


def fingerprint(gpt: GPT, task: Task, settings: dict[str, Any]) -> str:
    """A SHA-256 sum over all that decides the scores to the bit: weights, task and settings.

    Args:
        gpt: the network, before it is moved to the device.
        task: what is scored.
        settings: anything else, as JSON has it.
    """
    sum_ = hashlib.sha256(json.dumps([dataclasses.asdict(gpt.config), task.digest(), settings]).encode())
    for name, param in gpt.named_parameters():
        sum_.update(name.encode())
        sum_.update(param.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sum_.hexdigest()


class Progress:
    """Scores of an evaluation in a hidden file, a line per item, until all are there.

    The file's name has the start of the fingerprint, and its first line all of it, so that no score of another
    evaluation is ever taken.

    Args:
        folder: where results go; it is made if it is missing.
        task: what is scored.
        fingerprint: see the function.
    """

    def __init__(self, folder: Path, task: Task, fingerprint: str):
        self.folder, self.task, self.fingerprint = folder, task, fingerprint
        self.name = f"{task.name}_{fingerprint[:12]}"
        self.path = folder / f".{self.name}{UNFINISHED}"

    def open(self, held: contextlib.ExitStack) -> Found:
        """The scores that an interrupted evaluation left, up to a damaged line. The file is locked until `held` ends.

        Raises:
            BadInput: another process is at the same evaluation, or the file cannot be read or written.
        """
        with write_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        held.enter_context(exclusive(self.path, "the unfinished evaluation"))
        try:
            with open_regular(self.path, limit=LONGEST) as file:
                first, *lines = file.read().split(b"\n")
        except OSError as error:
            raise BadInput(f"cannot read {self.path}: {error.strerror or error}; remove it") from error
        done: Found = {}
        intact = 0
        if lines and first == self._head():
            intact = len(first) + 1
            for line in lines[:-1]:  # what follows the last newline is a line that was cut
                parsed = self._parse(line)
                if parsed is None:
                    break
                done |= [parsed]
                intact += len(line) + 1
        with write_errors(self.path), open(self.path, "r+b") as file:
            file.truncate(intact)
            if not intact:
                file.write(self._head() + b"\n")
        return done

    def keep(self, found: Found) -> None:
        """Append scores. What is written before a crash of this process stays."""
        with write_errors(self.path), open(self.path, "ab") as file:
            file.write(_lines(found))

    def finish(self, results: dict[str, Any]) -> Path:
        """Write the results, a row of them, and the file of scores under its final name. Returns where results are.

        Raises:
            BadInput: a file cannot be written. The scores stay.
        """
        path = self.folder / f"{self.name}.json"
        results = {key: _finite(value) for key, value in results.items()} | {"fingerprint": self.fingerprint}
        with atomic_write(path) as file:
            file.write(json.dumps(results, indent=2).encode() + b"\n")
        with write_errors(self.folder / LOG):
            with open(self.folder / LOG, "ab") as file:
                file.write(json.dumps(results).encode() + b"\n")
            os.replace(self.path, self.folder / f"{self.name}.items.jsonl")
        return path

    def _head(self) -> bytes:
        return json.dumps({"fingerprint": self.fingerprint}).encode()

    def _parse(self, line: bytes) -> tuple[int, list[Score]] | None:
        """The scores in a line; None if it is damaged."""
        try:
            record = require(parse_json(line), _LINE)
        except ValueError:
            return None
        i = record["item"]
        if i >= len(self.task.items) or len(record["scores"]) != len(self.task.items[i]):
            return None
        return i, [Score(math.nan if ll is None else float(ll), greedy) for ll, greedy in record["scores"]]


def _lines(found: Found) -> bytes:
    """Scores as lines of JSON, which has no NaN."""
    lines = (
        json.dumps({"item": i, "scores": [[_finite(score.log_likelihood), score.greedy] for score in scores]})
        for i, scores in found.items()
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _finite(value: Any) -> Any:
    """null for a number that JSON does not have, also among the values of an object."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
