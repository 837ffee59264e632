"""From text to shards: the tokens of every corpus, derived here; a folder that is whole or not there."""

import errno
import http.client
import io
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import types
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import common
from common import BadInput
from data import prepare
from data.loader import ShardLoader
from data.tokenizer import gpt2_encoding
from tests.conftest import ROOT
from training.config import parse

DOCUMENTS = ["The first one.", "A second\n\nwith a blank line", "", "It spells <|endoftext|> out.", "Grüße 🌍"]


def tokens_of(documents) -> list[int]:
    """What the corpus must become: end-of-text before each document, and nothing else that is special."""
    encode = gpt2_encoding().encode_ordinary
    return list(itertools.chain.from_iterable([50256, *encode(text)] for text in documents))


def named(texts) -> Iterator[prepare.Document]:
    return (prepare.Document(f"document {i}", text) for i, text in enumerate(texts))


def shards(folder: Path, kind: str) -> list[list[int]]:
    """Read after SPEC section 2."""
    read = []
    for path in sorted(folder.glob(f"{kind}_*.bin")):
        header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
        assert header.tolist() == [20240520, 1, len(tokens)] + 253 * [0]
        read.append(tokens.tolist())
    return read


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

        monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)

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
            return stream()

        def stream():
            for page in pages:
                if isinstance(page, Exception):
                    raise page
                yield {"text": page, "url": "https://example.org"}

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
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


def test_text_of_files_folders_and_jsonl(run, tmp_path):
    folder = tmp_path / "notes"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_text("b, of the folder")
    (folder / "a.md").write_text("a, of the folder")
    (folder / "deeper" / "c.jsonl").write_text('{"text": "line 1"}\n\n{"text": "line <|endoftext|> 3", "id": 3}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "named.py").write_text("print('of any suffix, where it is named')\n")
    expected = ["print('of any suffix, where it is named')\n", "a, of the folder", "b, of the folder"]
    expected += ["line 1", "line <|endoftext|> 3"]
    assert all_tokens(run("text", tmp_path / "named.py", folder)) == tokens_of(expected)


def test_text_of_a_named_field(run, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"body": text, "text": 7}) + "\n" for text in DOCUMENTS))
    assert all_tokens(run("text", path, "--field", "body")) == tokens_of(DOCUMENTS)


def test_text_of_standard_input(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\r\n<|endoftext|>\n".encode())))
    (tmp_path / "first.txt").write_text("first")
    assert all_tokens(run("text", tmp_path / "first.txt", "-")) == tokens_of(["first", "Grüße\r\n<|endoftext|>\n"])


def test_tinyshakespeare(run, answers):
    answers(b"First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n\nEnd.\n")
    folder = run("tinyshakespeare", "--val_tokens", 4)
    assert all_tokens(folder) == tokens_of(["First Citizen:\nSpeak.\n\n", "All:\nSpeak, speak.\n\n", "End.\n"])
    answers(b"Speak, speak.\n\n" * 10_000)
    assert [len(shard) for shard in shards(run("tinyshakespeare"), "val")] == [32_768]


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
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    folder = run("text", path, "--shard_tokens", shard_tokens, "--val_tokens", val_tokens)
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


def test_flags_that_are_printed_train_on_it(tmp_path, capsys):
    (tmp_path / "x.txt").write_text(100 * " word")
    prepare.main(["text", str(tmp_path / "x.txt"), "--output_dir", str(tmp_path / "two words"), "--workers", "1"])
    told = capsys.readouterr().out
    assert "91 tokens to train on, 10 to validate with" in told
    config = parse(shlex.split(told.split("python train.py ")[1]))
    assert ShardLoader(config.input_bin, 1, 1).total_tokens == 91
    assert ShardLoader(config.input_val_bin, 1, 1).total_tokens == 10


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


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_killed_on_the_way_leaves_no_folder(tmp_path, by):
    program = f"""
import os, signal, sys
from pathlib import Path
from data.prepare import Document, prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have this process ignore it
def documents():
    yield from (Document("a number", str(i)) for i in range(1000))
    os.kill(os.getpid(), {by.value})
prepare(documents(), Path(sys.argv[1]), 10, shard_tokens=100)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == -by
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [] if by == signal.SIGINT else [name.startswith(".out.") for name in left] == [True]
    prepare.prepare(named(map(str, range(1000))), tmp_path / "out", 10, shard_tokens=100)  # and it is not in the way
    assert all_tokens(tmp_path / "out") == tokens_of(map(str, range(1000)))


def test_full_disk(refused, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text(100 * "text ")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full)
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
        "empty": "no file below it ends in .txt, .md, .jsonl",
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
    """Standard input and all cores; the second time the folder is in the way."""
    command = [sys.executable, "-m", "data.prepare", "text", "-", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(DOCUMENTS).encode(), capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert all_tokens(tmp_path / "out") == tokens_of(["\n".join(DOCUMENTS)])
    again = subprocess.run(command, cwd=ROOT, input=b"x", capture_output=True, timeout=60)
    assert again.returncode == 2 and again.stderr.startswith(b"data.prepare: --output_dir ")
    assert len(again.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["out"]
