"""llm.c's file of multiple-choice questions, `hellaswag_val.bin`. docs/formats.md has it to the byte."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import BadInput, atomic_write
from data.tokenizer import VOCAB_SIZE
from readers import open_regular

MAGIC, VERSION = 20240522, 1
HEADER_BYTES = 256 * 4
START = 0xFFFF
"""the first number of every question"""
N_ENDINGS = 4
LARGEST = 0xFFFF
"""of every number in a question, and so of the questions in a file and the bytes of a question"""
LIMIT = 1 << 30
"""bytes of a file; HellaSwag's has 3.6 MB"""
REWRITE = "write it again with python -m evals hellaswag --write_bin FILE"


class Question(NamedTuple):
    """Token ids of a context and of the endings among which one is right."""

    label: int
    """place of the right one"""
    context: list[int]
    endings: list[list[int]]


def write(path: Path, questions: list[Question]) -> None:
    """Write a new file.

    Raises:
        BadInput: it exists or cannot be written, or there are too many questions, or one is too long.
    """
    if os.path.lexists(path):
        raise BadInput(f"{path} exists already; choose another place, or move it away")
    if len(questions) > LARGEST:
        raise BadInput(f"{len(questions)} questions are more than the {LARGEST} that {path} can number; give fewer")
    content, longest = b"", 0
    for i, question in enumerate(questions):
        numbers = [START, 0, i, question.label, len(question.endings)]
        for tokens in (question.context, *question.endings):
            numbers += [len(tokens), *tokens]
        numbers[1] = 2 * len(numbers)
        if numbers[1] > LARGEST:
            raise BadInput(f"question {i} takes {numbers[1]} bytes, and {path} can say {LARGEST}; leave it out")
        content += np.array(numbers, "<u2").tobytes()
        longest = max(longest, numbers[1])
    header = np.zeros(256, "<i4")
    header[:4] = MAGIC, VERSION, len(questions), longest
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(content)


def read(path: Path) -> list[Question]:
    """Read all questions.

    Raises:
        BadInput: the file cannot be read, is of another kind, or is not intact.
    """
    try:
        with open_regular(path, follow=True, limit=LIMIT) as file:
            content = file.read()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}; name a file that exists") from error
    if len(content) < HEADER_BYTES:
        raise BadInput(f"{path}: cut short: {len(content)} bytes are less than the header's {HEADER_BYTES}; {REWRITE}")
    magic, version, n_questions, longest = np.frombuffer(content, "<i4", 4).tolist()
    if magic != MAGIC:
        raise BadInput(f"{path}: magic number {magic} instead of {MAGIC}: no questions of llm.c; {REWRITE}")
    if version != VERSION:
        raise BadInput(f"{path}: version {version} instead of {VERSION}; {REWRITE}")
    if not 0 < n_questions <= LARGEST:
        raise BadInput(f"{path}: its header claims {n_questions} questions; it must be from 1 to {LARGEST}; {REWRITE}")
    numbers = np.frombuffer(content, "<u2", (len(content) - HEADER_BYTES) // 2, HEADER_BYTES).tolist()
    found, at, most = [], 0, 0
    for i in range(n_questions):
        n_bytes = numbers[at + 1] if at + 1 < len(numbers) else 0
        of_question = numbers[at : at + n_bytes // 2]
        try:
            found.append(_question(of_question, n_bytes, i))
        except ValueError as error:
            raise BadInput(f"{path}: question {i} of {n_questions}: {error}; {REWRITE}") from error
        at += len(of_question)
        most = max(most, n_bytes)
    if HEADER_BYTES + 2 * at != len(content):
        raise BadInput(f"{path}: {len(content) - HEADER_BYTES - 2 * at} bytes come after its last question; {REWRITE}")
    if longest != most:
        raise BadInput(f"{path}: its header says that the longest question has {longest} bytes, not {most}; {REWRITE}")
    return found


def _question(numbers: list[int], n_bytes: int, place: int) -> Question:
    """Interpret the numbers of a question.

    Args:
        numbers: as many as there are in the file, of those that its length calls for.
        n_bytes: its length.
        place: of the question in the file.

    Raises:
        ValueError: it is not intact.
    """
    if len(numbers) < 6 or 2 * len(numbers) != n_bytes:
        raise ValueError(f"cut short: {2 * len(numbers)} bytes instead of {n_bytes or 'a whole question'}")
    start, _, number, label, n_endings = numbers[:5]
    if start != START or number != place:
        raise ValueError(f"it starts with {start} and has the number {number}, instead of {START} and {place}")
    if n_endings != N_ENDINGS:
        raise ValueError(f"it has {n_endings} endings instead of {N_ENDINGS}")
    if label >= n_endings:
        raise ValueError(f"its label is {label}; it must be from 0 to {n_endings - 1}")
    parts, at = [], 5
    for what in ("context", *(f"ending {k}" for k in range(n_endings))):
        length = numbers[at] if at < len(numbers) else 0
        part = numbers[at + 1 : at + 1 + length]
        if not part or len(part) < length:
            raise ValueError(f"its {what} has {len(part)} tokens instead of {length or 'at least 1'}")
        if max(part) >= VOCAB_SIZE:
            raise ValueError(f"its {what} has the token {max(part)}, beyond GPT-2's vocabulary of {VOCAB_SIZE}")
        parts.append(part)
        at += 1 + length
    if at != len(numbers):
        raise ValueError(f"{len(numbers) - at} numbers come after its last ending")
    return Question(label, parts[0], parts[1:])
