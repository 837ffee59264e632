"""llm.c's file of questions: to the byte, and what is refused."""

import struct

import pytest

from common import BadInput
from evals.eval_file import Question, read, write
from tests import formats

QUESTIONS = [
    Question(2, [464, 3290], [[318], [373, 257], [11], [50256, 0, 1]]),
    Question(0, [1], [[2], [3], [4], [5]]),
]


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "questions.bin", QUESTIONS)
    return tmp_path / "questions.bin"


def test_to_the_byte(path):
    assert formats.questions(path) == [tuple(question) for question in QUESTIONS]
    first = [65535, 38, 0, 2, 4, 2, 464, 3290, 1, 318, 2, 373, 257, 1, 11, 3, 50256, 0, 1]
    assert path.read_bytes()[1024 : 1024 + 38] == struct.pack("<19H", *first)
    assert read(path) == QUESTIONS


def test_nothing_is_overwritten(path):
    before = path.read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        write(path, QUESTIONS)
    assert path.read_bytes() == before


def test_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(BadInput, match="question 1 takes 65538 bytes"):
        write(tmp_path / "a.bin", [QUESTIONS[1], Question(0, 32755 * [1], [[2], [3], [4], [5]])])
    with pytest.raises(BadInput, match="65536 questions"):
        write(tmp_path / "a.bin", 65536 * [QUESTIONS[1]])
    assert list(tmp_path.iterdir()) == []


def test_cut_short_anywhere(path):
    whole = path.read_bytes()
    for n in (*range(0, 1024, 255), *range(1024, len(whole))):
        path.write_bytes(whole[:n])
        with pytest.raises(BadInput, match=r"cut short|come after|header"):
            read(path)


@pytest.mark.parametrize(
    ("at", "number", "told"),
    [
        ((0, "i"), 20240520, "magic number 20240520 instead of 20240522"),
        ((4, "i"), 2, "version 2 instead of 1"),
        ((8, "i"), 0, "claims 0 questions"),
        ((8, "i"), 3, "question 2 of 3: cut short"),
        ((8, "i"), 1, "bytes come after its last question"),
        ((12, "i"), 40, "longest question has 40 bytes, not 38"),
        ((1024, "H"), 1, "starts with 1"),
        ((1026, "H"), 36, "question 0 of 2: its ending 3 has 2 tokens instead of 3"),
        ((1028, "H"), 1, "the number 1"),
        ((1030, "H"), 4, "its label is 4; it must be from 0 to 3"),
        ((1032, "H"), 3, "3 endings instead of 4"),
        ((1034, "H"), 0, "its context has 0 tokens instead of at least 1"),
        ((1036, "H"), 50257, "the token 50257, beyond GPT-2's vocabulary"),
    ],
)
def test_damaged(path, at, number, told):
    content = bytearray(path.read_bytes())
    struct.pack_into(f"<{at[1]}", content, at[0], number)
    path.write_bytes(content)
    with pytest.raises(BadInput, match=told) as refused:
        read(path)
    assert str(path) in str(refused.value) and "--write_bin" in str(refused.value)
