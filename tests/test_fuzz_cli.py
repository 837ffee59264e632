"""Hostile values for every flag: each is taken, or refused in one line. The seed is fixed."""

import dataclasses
import sys

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from common import BadInput
from training.config import Config, parse

FLAGS = [field.name for field in dataclasses.fields(Config)]
TEXTS = ("model", "backend", "input_bin", "input_val_bin", "device", "resume", "output_dir")
CHARACTERS = st.characters(exclude_characters="\0")  # the operating system passes no NUL
HOSTILE = ["", "-", "--", "-1", "--help", "-h", "=", "٣", "0x10", "1_0", " 1 ", "1" * 400, "9" * 5000, "triton,"]
HOSTILE += ["1e400", "-1e400", "nan", "inf", "1e38", "x" * 300, "a/b", "[", "***", "$(x)", "'\"", "a\nb", "é"]
HOSTILE += ["\x1b[2J", "\udcff"]
NUMBERS = st.one_of(st.integers(), st.floats())
VALUES = st.one_of(st.sampled_from(HOSTILE), NUMBERS.map(str), st.text(CHARACTERS, max_size=20))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), VALUES, st.booleans()), max_size=4))
def test_parser_takes_it_or_refuses_it(flags):
    argv = []
    for name, value, joined in flags:
        argv += [f"--{name}={value}"] if joined else [f"--{name}", value]
    try:
        config = parse(argv)
    except BadInput:
        return
    for device in ("cpu", "cuda"):
        try:
            resolved = config.resolved(device).with_batch(8, lambda: 16)
        except BadInput:
            continue
        assert resolved.grad_accum_steps(8) >= 1
        assert all(value <= sys.maxsize for value in dataclasses.astuple(resolved) if isinstance(value, int))


def stays_here(value: str) -> bool:
    """Whether no path outside the working folder is named."""
    return not value.startswith("/") and ".." not in value


@pytest.mark.parametrize("name", TEXTS)
def test_set_up_takes_it_or_refuses_it(name, tiny, tmp_path, monkeypatch, capfd):
    """Everything but the loop, with one flag that is no number; nothing is fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train, "train", lambda *arguments: 0)
    base = [f"{name}={value}" for name, value in (tiny | {"--output_dir": ""}).items()]

    def set_up(value: str) -> None:
        try:
            assert train.main([*base, f"--{name}={value}"]) == 0
        except SystemExit as stopped:
            assert stopped.code == 2
            errors = capfd.readouterr().err
            assert errors.startswith("train.py: ") and errors.count("\n") == 1

    for value in filter(stays_here, HOSTILE):
        set_up(value)
    fuzz = given(st.text(CHARACTERS, max_size=20).filter(stays_here))(set_up)
    settings(max_examples=8, derandomize=True, deadline=None)(fuzz)()
