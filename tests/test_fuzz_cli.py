"""Hostile values for every flag: each is taken, or refused in one line. The seed is fixed."""

import dataclasses
import sys

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from common import BadInput
from training.config import Config, parse

FLAGS = [field.name for field in dataclasses.fields(Config)]
CHARACTERS = st.characters(exclude_characters="\0")  # the operating system passes no NUL
HOSTILE = [
    "",
    "-",
    "--",
    "-1",
    "--help",
    "-h",
    "=",
    "٣",
    "1" * 400,
    "9" * 5000,
    "1e400",
    "-1e400",
    "nan",
    "inf",
    "1e38",
]
HOSTILE += [
    "x" * 300,
    "a/b",
    "[",
    "***",
    "$(x)",
    "'\"",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "é",
    "0x10",
    "1_0",
    " 1 ",
    "triton,",
]
VALUES = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers().map(str),
    st.floats().map(str),
    st.text(CHARACTERS, max_size=20),
)


@settings(max_examples=400, derandomize=True, deadline=None)
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
            resolved = config.resolved(device, world_size=8)
        except BadInput:
            continue
        assert resolved.grad_accum_steps(8) >= 1
        assert all(value <= sys.maxsize for value in dataclasses.astuple(resolved) if isinstance(value, int))


@pytest.mark.parametrize("name", FLAGS)
def test_set_up_takes_it_or_refuses_it(name, tiny, tmp_path, monkeypatch, capfd):
    """As far as the loop, with one flag after the other; nothing is fetched, and nothing is left outside the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train, "train", lambda *arguments: 0)
    monkeypatch.setattr(train, "try_code_generation", lambda *arguments: None)
    base = [f"{name}={value}" for name, value in (tiny | {"--output_dir": ""}).items()]

    @settings(
        max_examples=12,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(VALUES.filter(lambda value: not value.startswith("/") and ".." not in value))
    def set_up(value):
        try:
            assert train.main([*base, f"--{name}={value}"]) == 0
        except SystemExit as stopped:
            assert stopped.code == 2
            errors = capfd.readouterr().err
            assert errors.startswith("train.py: ") and errors.count("\n") == 1

    set_up()
