"""From text to shards: the tokens of every corpus, derived here; a folder that is complete or not there."""

import contextlib
import errno
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import common
import train
from common import BadInput
from data import prepare
from data.loader import ShardLoader
from data.tokenizer import gpt2_encoding
from tests import formats
from tests.conftest import ROOT
from training.config import parse
from training.distributed import World

DOCUMENTS = ["The first one.", "A second\n\nwith a blank line", "", "It spells <|endoftext|> out.", "Grüße 🌍"]


def tokens_of(documents) -> list[int]:
    """What the corpus must become: end-of-text before each document, and nothing else that is special."""
    encode = gpt2_encoding().encode_ordinary
    return list(itertools.chain.from_iterable([50256, *encode(text)] for text in documents))


def named(texts) -> Iterator[prepare.Document]:
    return (prepare.Document(f"document {i}", text) for i, text in enumerate(texts))


def shards(folder: Path, kind: str) -> list[list[int]]:
    return [formats.shard(path) for path in sorted(folder.glob(f"{kind}_*.bin"))]


def all_tokens(folder: Path) -> list[int]:
    """Validation, then training: the corpus in its order."""
    return list(itertools.chain.from_iterable(shards(folder, "val") + shards(folder, "train")))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path):
    """Run the command line into a new folder; return the folder."""
    numbers = itertools.count()

    def run(*argv) -> Path:
        folder = tmp_path / f"out{next(numbers)}"
        prepare.main([str(word) for word in (*argv, "--output_dir", folder, "--workers", 1)])
        assert list(tmp_path.glob(".*")) == []
        return folder

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command line; check that it is refused in one line and leaves nothing; return the line."""

    def run(*argv, output_dir=None) -> str:
        before = sorted(tmp_path.rglob("*"))
        output_dir = output_dir or tmp_path / "new" / "out"
        with pytest.raises(SystemExit) as stopped:
            prepare.main([str(word) for word in (*argv, "--output_dir", output_dir, "--workers", 1)])
        assert stopped.value.code == 2
        errors = capsys.readouterr().err.strip()
        assert errors.startswith("data.prepare: ") and "\n" not in errors
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return errors

    return run


@pytest.fixture
def answers(monkeypatch):
    """A stand-in for the network: what urlopen gives, or raises."""

    def stand_in(answer):
        def urlopen(url, timeout):
            assert url.endswith("tinyshakespeare/input.txt") and timeout <= 60
            if isinstance(answer, Exception):
                raise answer
            return answer if hasattr(answer, "read") else io.BytesIO(answer)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    return stand_in


@pytest.fixture
def fineweb(monkeypatch):
    """A stand-in for the library datasets: a stream of pages, of which an exception is raised."""
    asked = []

    def stand_in(*pages, at_once=None):
        def load_dataset(*args, **options):
            asked.append((args, options))
            if at_once:
                raise at_once
            return Stream()

        class Stream:
            """Pages that can be skipped, as those of datasets."""

            def skip(self, n):
                return itertools.islice(self, n, None)

            def __iter__(self):
                for page in pages:
                    if isinstance(page, Exception):
                        raise page
                    if callable(page):
                        page()
                    else:
                        yield {"text": page, "url": "https://example.org"}

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return stand_in


# The corpora


def test_pydoc(run):
    from pydoc_data.topics import topics

    folder = run("pydoc")
    ids = all_tokens(folder)
    documents = gpt2_encoding().decode(ids).split("<|endoftext|>")
    assert documents[0] == "" and sorted(documents[1:]) == sorted(topics.values())
    assert ids == tokens_of(documents[1:])
    assert documents[1:] != [topics[name] for name in sorted(topics)]  # mixed, because the first part validates
    assert [len(shard) for shard in shards(folder, "val")] == [20 * 8 * 128 + 1]
    assert len(shards(folder, "train")) == 1


def test_pydoc_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SHARDS", tmp_path / "shards")
    folder = prepare.prepare_pydoc()
    assert folder.parent == tmp_path / "shards" and str(folder) in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.prepare_pydoc() == folder and capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_pydoc_made_by_another_process_in_the_meantime(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARDS", tmp_path)
    make = prepare.prepare

    def slower(documents, folder, *args):
        make(documents, folder, *args)  # the other one
        return make(documents, folder, *args)

    monkeypatch.setattr(prepare, "prepare", slower)
    folder = prepare.prepare_pydoc()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert sorted(contents(folder)) == ["train_000000.bin", "val_000000.bin"]


def test_tinyshakespeare(run, answers):
    answers(b"First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n\nEnd.\n")
    folder = run("tinyshakespeare", "--val_tokens", 4)
    assert all_tokens(folder) == tokens_of(["First Citizen:\nSpeak.\n\n", "All:\nSpeak, speak.\n\n", "End.\n"])
    answers(b"Speak, speak.\n\n" * 10_000)
    assert [len(shard) for shard in shards(run("tinyshakespeare"), "val")] == [32_768]


def test_what_is_in_a_folder_is_read_or_told(run, refused, tmp_path, capsys):
    folder = tmp_path / "notes"
    outside = tmp_path / "outside"
    for path in (folder / ".git", folder / "deeper", outside):
        path.mkdir(parents=True)
    (tmp_path / "named.py").write_text("print('of any suffix, where it is named')\n")
    (folder / "deeper" / "e.jsonl").write_text('{"text": "line 1"}\n\n{"text": "line <|endoftext|> 3", "id": 3}\n')
    (folder / "c.ndjson").write_bytes(b'\xef\xbb\xbf{"text": "a line"}\n')
    (folder / "b.Md").write_text("a, b")
    (folder / "A.TXT").write_bytes(b"\xef\xbb\xbfupper case, and a BOM")
    (folder / "d.json").write_text('[{"text": "a record"}]')
    (folder / "e.\x1b[31m").touch()
    (folder / "Makefile").touch()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / ".hidden.txt").write_text("hidden")
    os.mkfifo(folder / "pipe.txt")
    (outside / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "linked").symlink_to(outside)
    os.link(folder / "b.Md", folder / "deeper" / "again.md")
    read = ["print('of any suffix, where it is named')\n", "upper case, and a BOM", "a, b", "a line"]
    read += ["line 1", "line <|endoftext|> 3"]
    assert all_tokens(run("text", tmp_path / "named.py", folder, folder / "A.TXT")) == tokens_of(read)
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if line.startswith("not read: "))
    assert sorted(line.removeprefix("not read: ").split(", ")) == [
        *("1 ending in .?[31m", "1 ending in .json", "1 no regular files", "1 without an ending"),
        *("2 given twice", "2 hidden", "2 links"),
    ]
    (tmp_path / "links").mkdir()
    (folder / "linked").rename(tmp_path / "links" / "linked")
    assert "(not read: 1 links)" in refused("text", tmp_path / "links")


def test_folder_that_cannot_be_read_is_told(run, tmp_path, capsys, monkeypatch):
    """The system does not refuse root, so its answer is made up."""
    for name in ("open", "closed"):
        (tmp_path / "notes" / name).mkdir(parents=True)
        (tmp_path / "notes" / name / "x.txt").write_text(name)
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        folder = run("text", tmp_path / "notes")
    assert all_tokens(folder) == tokens_of(["open"])
    assert "not read: 1 folders that cannot be read" in capsys.readouterr().out


def test_link_that_takes_the_place_of_a_file_is_not_followed(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    documents = prepare.text_documents([str(tmp_path)], "text", Counter())
    assert next(documents).text == "a.txt"
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(BadInput, match=f"cannot read {tmp_path / 'b.txt'}: Too many levels of symbolic links"):
        next(documents)


@pytest.mark.parametrize("content", ['[{"text": "one"}, {"text": "two"}]', '{"text": "one"}\n{"text": "two"}\n'])
def test_json_is_read_as_records(run, refused, tmp_path, monkeypatch, content):
    path = tmp_path / "x.JSON"
    path.write_text(content)
    assert all_tokens(run("text", path)) == tokens_of(["one", "two"])
    assert f"{path}, {'record' if content[0] == '[' else 'line'} 1: no text in the field" in refused(
        "text", path, "--field", "x"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert "standard input is JSON, not text" in refused("text", "-")
    (tmp_path / "x.data").write_text(content)
    assert "x.data is JSON, not text" in refused("text", tmp_path / "x.data")


@pytest.mark.parametrize("sample", ["10B", "100B"])
def test_fineweb(run, fineweb, sample):
    asked = fineweb(*DOCUMENTS)
    folder = run("fineweb", "--sample", sample, "--shard_tokens", 9)
    assert asked == [
        (("HuggingFaceFW/fineweb",), {"name": f"sample-{sample}T", "split": "train", "streaming": True}),
    ]
    assert all_tokens(folder) == tokens_of(DOCUMENTS)
    assert [len(shard) for shard in shards(folder, "val")] == [9]  # the first shard validates, as in llm.c


# Shards and the split


@pytest.mark.parametrize(("shard_tokens", "val_tokens"), [(7, 5), (7, 7), (7, 20), ("1e1", 3), (1, 1), (10**8, 4)])
def test_split_into_shards(run, tmp_path, shard_tokens, val_tokens):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"body": text, "text": 7}) + "\n" for text in DOCUMENTS))
    folder = run("text", path, "--field", "body", "--shard_tokens", shard_tokens, "--val_tokens", val_tokens)
    expected = tokens_of(DOCUMENTS)
    size = int(float(shard_tokens))
    for kind, part in {"val": expected[:val_tokens], "train": expected[val_tokens:]}.items():
        assert shards(folder, kind) == [part[i : i + size] for i in range(0, len(part), size)]


@pytest.mark.parametrize(("n_words", "n_val"), [(8, 0), (9, 1), (1009, 101), (400_000, 32_768)])
def test_a_tenth_validates_where_nothing_is_said(run, tmp_path, n_words, n_val):
    path = tmp_path / "x.txt"
    path.write_text(n_words * " word")  # a token each, and end-of-text
    folder = run("text", path)
    assert sum(map(len, shards(folder, "val"))) == n_val
    assert len(all_tokens(folder)) == n_words + 1


@pytest.mark.parametrize("n_documents", [1, 700])
def test_two_workers_write_the_bytes_of_one(tmp_path, n_documents):
    rng = np.random.default_rng(5)
    documents = [" ".join(map(str, rng.integers(0, 1000, rng.integers(0, 30)))) + "." for _ in range(n_documents)]
    for workers in (1, 2):
        prepare.prepare(named(documents), tmp_path / str(workers), 1, shard_tokens=1000, workers=workers)
    assert all_tokens(tmp_path / "1") == tokens_of(documents)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize(
    "name",
    ["a [b]", "*", "it's", "two  words", "$(touch pwned); `touch pwned`", 'quo"te', "new\nline", "-dash", "[!x]?"],
)
def test_flags_that_are_printed_survive_a_shell(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text(100 * " word")
    prepare.main(["text", "x.txt", f"--output_dir={name}", "--workers", "1"])
    told, _, line = capsys.readouterr().out.partition("train on them: python train.py ")
    assert "91 tokens to train on, 10 to validate with" in told
    words = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    config = parse(words.split("\0")[:-1])
    assert ShardLoader(config.input_bin, 1, 1).total_tokens == 91
    assert ShardLoader(config.input_val_bin, 1, 1).total_tokens == 10
    assert sorted(os.listdir()) == sorted(["x.txt", name])
    # As somebody would write it who does not know of globs.
    assert ShardLoader(f"{tmp_path / name}/train_*.bin", 1, 1).total_tokens == 91


@pytest.mark.parametrize("n_tokens", [2, 19, 20, 300, 1300, 11_000, 50_000])
def test_flags_for_a_small_corpus_are_such_that_train_on_it(tmp_path, capsys, n_tokens):
    (tmp_path / "x.txt").write_text((n_tokens - 1) * " word")
    prepare.main(["text", str(tmp_path / "x.txt"), "--output_dir", str(tmp_path / "out"), "--workers", "1"])
    told = capsys.readouterr().out
    if n_tokens == 19:
        assert "a val shard has 1 token and a step reads at least 2" in told
    config = parse(shlex.split(told.partition("train on them: python train.py ")[2]))
    assert bool(config.input_val_bin) == (n_tokens >= 20)
    for device in ("cpu", "cuda"):
        chosen = config.resolved(device).with_batch(1, lambda: 1)
        for pattern in filter(None, (config.input_bin, config.input_val_bin)):
            ShardLoader(pattern, chosen.batch_size, chosen.sequence_length).next_batch()
    assert ("--batch_size" in told) == (n_tokens < 10_000), told


def test_corpus_of_one_token(tmp_path, capsys):
    (tmp_path / "x.txt").touch()
    prepare.main(["text", str(tmp_path / "x.txt"), "--output_dir", str(tmp_path / "out"), "--workers", "1"])
    told = capsys.readouterr().out
    assert "a train shard has 1 token and a step reads at least 2: give more text" in told and "train.py" not in told


def test_default_batches_are_those_of_train():
    configs = [parse([]).resolved(device).with_batch(1, lambda: 1) for device in ("cpu", "mps", "cuda")]
    batches = [(config.batch_size, config.sequence_length) for config in configs]
    assert min(batches, key=math.prod) == (prepare.DEFAULT_BATCH, prepare.DEFAULT_LENGTH)
    assert max(map(math.prod, batches)) == prepare.DEFAULT_TOKENS


def test_clone_in_a_folder_with_brackets(tmp_path, monkeypatch, capsys):
    """And shards that are given twice, or to train and to validate, are told."""
    monkeypatch.setattr(prepare, "SHARDS", tmp_path / "a [clone]" / "shards")
    gpt: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=50257))
    world = World(0, 0, 1, torch.device("cpu"), False)

    def warnings(*flags) -> list[str]:
        train.open_data(parse([str(flag) for flag in flags]).resolved("cpu"), world, gpt)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]

    assert warnings() == []
    (folder,) = (tmp_path / "a [clone]" / "shards").iterdir()
    shutil.copy(folder / "val_000000.bin", tmp_path / "copy.bin")
    (tmp_path / "link.bin").symlink_to(folder / "val_000000.bin")
    pattern = f"{folder}/*_000000.bin"
    (line,) = warnings("--input_bin", pattern, "--input_val_bin", tmp_path / "copy.bin")
    assert str(folder / "val_000000.bin") in line and "train_" not in line and "and in --input_val_bin" in line
    (line,) = warnings("--input_bin", tmp_path / "*.bin")
    assert f"{tmp_path / 'link.bin'} have the same tokens as shards before them" in line


# Whole or not there


def test_folder_appears_when_it_is_complete(tmp_path):
    def documents():
        yield from texts
        assert not folder.exists()
        # What was read went into shards, save what the last tasks brought: the corpus may be larger than memory.
        n_shards = len(list(tmp_path.rglob("train_*.bin")))
        assert 100 * n_shards >= len(expected) - 2 * 64 * 5

    texts = [f"document {i}" for i in range(1000)]
    expected = tokens_of(texts)
    folder = tmp_path / "new" / "out"
    prepare.prepare(named(documents()), folder, 10, shard_tokens=100)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert all_tokens(folder) == expected


def test_folder_that_another_process_made_in_the_meantime(tmp_path):
    def documents():
        yield from DOCUMENTS
        folder.mkdir()
        (folder / "train_000000.bin").write_bytes(b"theirs")

    folder = tmp_path / "out"
    with pytest.raises(BadInput, match=f"cannot write {folder}: "):
        prepare.prepare(named(documents()), folder, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(folder) == {"train_000000.bin": b"theirs"}


@pytest.mark.parametrize("workers", [1, 2])
def test_exception_on_the_way_leaves_nothing(tmp_path, workers):
    def documents():
        for i in range(2000):
            yield f"document {i}"
        assert list(tmp_path.rglob("train_*.bin"))
        raise RuntimeError("of the corpus")

    with pytest.raises(RuntimeError, match="of the corpus"):
        prepare.prepare(named(documents()), tmp_path / "new" / "out", 10, shard_tokens=100, workers=workers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_on_the_way_leaves_no_folder(tmp_path, by):
    command = [sys.executable, "-m", "data.prepare", "text", "-", "--output_dir", str(tmp_path / "new" / "out")]
    process = subprocess.Popen(
        [*command, "--workers", "1"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell may have it ignored
    )
    while process.poll() is None and not list(tmp_path.rglob("*.part/out")):
        time.sleep(0.02)
    process.send_signal(by)
    errors = process.communicate(timeout=60)[1]
    if by == signal.SIGKILL:
        assert process.returncode == -by
        assert [path.name.startswith(".out.") for path in (tmp_path / "new").iterdir()] == [True]
    else:
        assert process.returncode == 128 + by and errors.decode() == f"data.prepare: stopped by {by.name}\n"
        assert list(tmp_path.iterdir()) == []
    prepare.prepare(named(DOCUMENTS), tmp_path / "new" / "out", 10)  # and it is not in the way
    assert all_tokens(tmp_path / "new" / "out") == tokens_of(DOCUMENTS)


@contextlib.contextmanager
def time_limit(seconds: int):
    """Fail instead of waiting for ever."""

    def stop(number, frame):
        pytest.fail(f"nothing for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_worker_that_is_killed(tmp_path, monkeypatch, capfd):
    """By the system, for want of memory: one line that says with which documents, and nothing is left."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": 100 * f" {i}"}) + "\n" for i in range(2000)))

    def kill(*args):
        for process in multiprocessing.active_children():
            process.kill()

    monkeypatch.setattr(prepare, "write_shard", kill)  # as soon as there are tokens
    with time_limit(120), pytest.raises(SystemExit) as stopped:
        argv = ["text", str(path), "--output_dir", str(tmp_path / "out"), "--workers", "2"]
        prepare.main([*argv, "--val_tokens", "10"])  # so that most of the text is still to come
    (line,) = capfd.readouterr().err.splitlines()
    first, last = re.findall(rf"{path}, line (\d+)", line)
    assert stopped.value.code == 2 and 0 < int(last) - int(first) < 64 and "died with" in line
    assert multiprocessing.active_children() == [] and os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_document_that_the_tokenizer_fails_on(tmp_path, capfd, workers):
    """Its regular expressions give up on a long run of blanks, and what Rust code raises is no Exception."""
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "long.txt").write_text(1_000_000 * " " + "x")
    argv = ["text", str(tmp_path / "fine.txt"), str(tmp_path / "long.txt"), "--output_dir", str(tmp_path / "out")]
    with time_limit(120), pytest.raises(SystemExit) as stopped:
        prepare.main([*argv, "--workers", str(workers)])
    (line,) = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(
        f"data.prepare: {tmp_path / 'long.txt'}: GPT-2's tokenizer fails"
    )
    assert sorted(os.listdir(tmp_path)) == ["fine.txt", "long.txt"]


# FineWeb, which resumes


PAGES = [f"page {i} " + i % 7 * "with more words " for i in range(400)]


@pytest.fixture
def fineweb_into(capsys, tmp_path):
    """Prepare what the stand-in for datasets gives into tmp_path/out; return the exit status and what was told."""

    def run(*argv) -> tuple[int, str]:
        status = 0
        try:
            prepare.main(["fineweb", "--output_dir", str(tmp_path / "out"), "--shard_tokens", "300", *argv])
        except SystemExit as stopped:
            status = int(stopped.code)
        told = capsys.readouterr()
        assert len(told.err.splitlines()) == (status != 0), told.err
        return status, told.out + told.err

    return run


def raise_signal(number):
    """What a page is when a signal comes while it is fetched."""
    return lambda: os.kill(os.getpid(), number)


def test_fineweb_resumes_behind_its_finished_shards(fineweb, fineweb_into, tmp_path):
    prepare.prepare(named(PAGES), tmp_path / "whole", 300, 300)
    breaks = [(150, ConnectionError("gone")), (250, raise_signal(signal.SIGTERM)), (390, raise_signal(signal.SIGHUP))]
    finished = []
    for at, event in breaks:
        fineweb(*PAGES[:at], event, *PAGES[at:])
        status, told = fineweb_into("--workers", "1")
        assert status == (2 if isinstance(event, Exception) else 128 + event.__closure__[0].cell_contents)
        assert "the finished shards stay, and the same command resumes behind them" in told
        assert os.listdir(tmp_path / "out") == [".unfinished"]  # no glob of train.py takes it for a corpus
        finished.append(len(list((tmp_path / "out" / ".unfinished").glob("*.bin"))))
    assert 0 < finished[0] < finished[1] < finished[2]
    fineweb(*PAGES)
    status, told = fineweb_into("--workers", "2")
    assert status == 0 and "resuming behind" in told
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "is not empty" in fineweb_into()[1]


def test_fineweb_without_a_finished_shard_leaves_nothing(fineweb, fineweb_into, tmp_path):
    fineweb(*PAGES[:20], ConnectionError("gone"))
    status, told = fineweb_into("--workers", "1")
    assert status == 2 and "finished shards" not in told and list(tmp_path.iterdir()) == []


def test_fineweb_resumes_only_the_same(fineweb, fineweb_into, tmp_path, monkeypatch):
    unfinished = tmp_path / "out" / ".unfinished"
    fineweb(*PAGES[:200], ConnectionError("gone"))
    fineweb_into("--workers", "1")
    before = contents(unfinished)
    fineweb(*PAGES)
    assert "unfinished shards of val_tokens 300, and this command has 9" in fineweb_into("--val_tokens", "9")[1]
    assert "of corpus 'fineweb sample-10BT', and" in fineweb_into("--sample", "100B")[1]
    fineweb(*reversed(PAGES))
    assert "the corpus is another than the one in" in fineweb_into("--workers", "1")[1]
    with pytest.raises(BadInput, match=r"holds unfinished work of another command in \.unfinished"):
        prepare.prepare(named(DOCUMENTS), tmp_path / "out")
    assert contents(unfinished) == before

    fineweb(*PAGES)
    state = json.loads(before["state.json"])
    for change in (
        *({"val": n} for n in (-1, True, 1e308, 10**400, "300", None, 299)),
        {"documents": -1},
        {"train": state["train"] + 300},
        {"settings": []},
        {"more": 1},
    ):
        (unfinished / "state.json").write_text(json.dumps(state | change))
        status, told = fineweb_into("--workers", "1")
        assert status == 2 and str(unfinished) in told, change
    for content in (b"", b"{", b"[]", b"[" * 100_000, b"\xff"):
        (unfinished / "state.json").write_bytes(content)
        status, told = fineweb_into("--workers", "1")
        assert status == 2 and "state.json cannot be used" in told
    assert contents(unfinished).keys() == before.keys()


def test_full_disk(refused, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text(100 * "text ")
    monkeypatch.setattr(common.os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    line = refused("text", tmp_path / "x.txt")
    assert "cannot write" in line and "No space left on device" in line


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_read_only_disk(refused):
    assert "cannot write /proc/out: " in refused("pydoc", output_dir="/proc/out")


def test_occupied_folder_and_file(refused, tmp_path, answers):
    answers(AssertionError("nothing is fetched for it"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "train_000000.bin").write_bytes(b"mine")
    assert f"--output_dir {tmp_path / 'notes'} is not empty" in refused(
        "tinyshakespeare", output_dir=tmp_path / "notes"
    )
    file = tmp_path / "notes" / "train_000000.bin"
    assert f"--output_dir {file} is a file" in refused("pydoc", output_dir=file)
    assert file.read_bytes() == b"mine"
    name = tmp_path / (300 * "x")
    assert f"cannot write --output_dir {name}: File name too long" in refused("pydoc", output_dir=name)


def test_empty_folder_is_taken_also_the_one_that_one_is_in(tmp_path, monkeypatch):
    for name, output_dir in {"a": tmp_path / "a", "b": Path(".")}.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        prepare.prepare(named(DOCUMENTS), output_dir, 3)
        assert all_tokens(tmp_path / name) == tokens_of(DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# What cannot be used


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "cut', "malformed JSON"),
        (b'{"text": "a"} {"text": "b"}', "malformed JSON"),
        (b'{"text": "\xff"}', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"body": "a"}', "no text in the field 'text'; name it with --field"),
        (b'{"text": 3}', "no text in the field 'text'"),
        (b'["text"]', "no text in the field 'text'"),
    ],
    ids=["cut", "two in a line", "no UTF-8", "deep", "no field", "a number", "a list"],
)
def test_malformed_jsonl_names_file_and_line(refused, tmp_path, line, told):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n{"text": "fine as well"}\n' + line + b'\n{"text": "behind"}\n')
    errors = refused("text", path)
    assert f"{path}, line 4: " in errors and told in errors


def test_paths_that_hold_no_text(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin1"))
    (tmp_path / "nothing.jsonl").touch()
    for name, told in {
        "nowhere": "no such file or folder",
        300 * "long": "no such file or folder",
        "empty": "no file below it ends in .txt, .md, .jsonl, .ndjson",
        "latin1.txt": "byte 2 is no UTF-8",
    }.items():
        assert f"{tmp_path / name}: {told}" in refused("text", tmp_path / name)
    assert "the corpus has 0 tokens" in refused("text", tmp_path / "nothing.jsonl")


def test_validation_that_takes_everything(refused, tmp_path):
    (tmp_path / "x.txt").write_text(9 * " word")
    assert "--val_tokens takes 10 of them: none is left" in refused("text", tmp_path / "x.txt", "--val_tokens", 10)


@pytest.mark.parametrize(
    "answer",
    [
        urllib.error.URLError("Name or service not known"),
        urllib.error.HTTPError("https://example.org", 404, "Not Found", None, None),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b"First", 1000),
    ],
    ids=lambda error: type(error).__name__,
)
def test_network_out_of_reach(refused, answers, answer):
    answers(answer)
    line = refused("tinyshakespeare")
    assert "tinyshakespeare cannot be fetched" in line and "python -m data.prepare text FILE" in line


def test_network_that_answers_nonsense(refused, answers):
    answers(b"\xff\xfe")
    assert "tinyshakespeare/input.txt: byte 0 is no UTF-8" in refused("tinyshakespeare")


class ClientError(Exception):
    """HTTP clients have errors that are no OSError."""


@pytest.mark.parametrize(
    "failure",
    [
        {"at_once": ConnectionError("Couldn't reach\nthe hub")},
        {"at_once": ClientError()},
        {"pages": [*DOCUMENTS, ClientError("gone")]},
    ],
    ids=["refused", "nameless", "in the middle"],
)
def test_hub_out_of_reach(refused, fineweb, failure):
    fineweb(*failure.pop("pages", []), **failure)
    line = refused("fineweb", "--shard_tokens", 5)
    assert "fineweb cannot be fetched from Hugging Face's hub" in line and "python -m data.prepare text PATH" in line


def test_missing_extra(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install -e '.[datasets]'" in refused("fineweb")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["poems"], "invalid choice: 'poems'"),
        ([], "required: CORPUS"),
        (["text"], "required: PATH"),
        (["pydoc", "--shard_tokens", "0"], "--shard_tokens: 0 is no whole number"),
        (["pydoc", "--shard_tokens", "123456.5"], "--shard_tokens: 123456.5 is no whole number"),
        (["pydoc", "--shard_tokens", "1e999"], "--shard_tokens: 1e999 is no whole number"),
        (["pydoc", "--shard_tokens", "3e9"], "--shard_tokens: 3e9 is no whole number from 1 to 2147483647"),
        (["pydoc", "--val_tokens", "few"], "--val_tokens: few is no whole number"),
        (["fineweb", "--sample", "1B"], "--sample: invalid choice: '1B'"),
    ],
)
def test_impossible_flags(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.setattr(prepare, "SHARDS", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        prepare.main(argv)
    errors = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and errors.startswith("data.prepare: ") and "\n" not in errors
    assert named in errors and list(tmp_path.iterdir()) == []


def test_command_line_in_a_process_of_its_own(tmp_path):
    """Standard input and all cores."""
    (tmp_path / "first.txt").write_text("first")
    command = [sys.executable, "-m", "data.prepare", "text", str(tmp_path / "first.txt"), "-"]
    command += ["--output_dir", str(tmp_path / "out")]
    text = "Grüße\r\n<|endoftext|>\n"
    done = subprocess.run(command, cwd=ROOT, input=text.encode(), capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert all_tokens(tmp_path / "out") == tokens_of(["first", text])
    assert sorted(os.listdir(tmp_path)) == ["first.txt", "out"]
