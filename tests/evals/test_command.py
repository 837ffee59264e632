"""The command line: what it writes, how it resumes, several ranks, the network, and what it refuses."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch

from evals import progress, read, score
from evals.__main__ import main
from evals.hellaswag import open_hellaswag
from model.llmc import load_model, write_model
from tests.conftest import command_line
from tests.evals import made
from tests.evals.conftest import results_of
from tests.training import ranks

N = 7
"""an odd number of questions, so that one of two ranks gets one more"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return made.hellaswag(tmp_path_factory.mktemp("questions") / "h.jsonl", N, longest=5)


def flags_of(output: Path, questions: Path, **more) -> list[str]:
    flags = {"--data": questions, "--device": "cpu", "--batch_size": 1, "--output_dir": output}
    return command_line(flags | {f"--{name}": value for name, value in more.items()})


@pytest.fixture(scope="module")
def whole(small, questions, tmp_path_factory):
    """What an evaluation leaves that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    assert main(["hellaswag", str(small), *flags_of(output, questions)]) == 0
    return results_of(output)


def without_names(results: dict) -> dict:
    return {key: value for key, value in results.items() if key not in ("model", "data")}


def test_results(whole, small, questions):
    results, scores = whole
    assert results["figures"] == open_hellaswag(questions).figures(scores)
    assert (results["task"], results["rule"], results["items"], results["limit"]) == ("hellaswag", "llm.c", N, None)
    assert (results["backend"], results["dtype"], results["batch_size"]) == ("eager", "float32", 1)
    assert len(results["fingerprint"]) == 64


def test_run_directory_gets_a_row_for_each_evaluation(small, questions, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(small, run / "model.bin")
    flags = command_line({"--data": questions, "--device": "cpu", "--limit": 1})
    assert main(["hellaswag", str(run), *flags]) == 0
    screen = capsys.readouterr().out
    assert main(["hellaswag", str(run), *flags, "--rule", "lm-eval"]) == 0
    rows = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert [(row["rule"], row["items"], row["limit"]) for row in rows] == [("llm.c", 1, 1), ("lm-eval", 1, 1)]
    files = sorted(path.name for path in run.iterdir())
    stems = [f"hellaswag_{row['fingerprint'][:12]}" for row in rows]
    names = [f"{stem}{ending}" for stem in stems for ending in (".json", ".items.jsonl")]
    assert files == sorted(["evals.jsonl", "model.bin", *names])
    acc, acc_norm = rows[0]["figures"].values()
    assert f"hellaswag (llm.c), {run}: acc {acc:.4f}, acc_norm {acc_norm:.4f} (items: 1)\n" in screen
    monkeypatch.chdir(tmp_path)
    assert main(["hellaswag", str(small), *flags]) == 0  # a file has no folder of its own
    assert (tmp_path / "runs" / "evals" / f"{stems[0]}.json").exists()


def kill_after(rank: int, n: int) -> None:
    """Make rank 0 kill itself half-way through the line after n batches. For a process of its own."""
    keep, calls = progress.Progress.keep, []

    def keep_and_die(self, found):
        calls.append(found)
        if len(calls) <= n:
            return keep(self, found)
        with open(self.path, "ab") as file:
            file.write(progress._lines(found)[:-9])
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        progress.Progress.keep = keep_and_die


def start(n_ranks: int, screen: Path, arguments: list[str], before=None, options=()) -> ranks.Ranks:
    return ranks.start(n_ranks, arguments, screen, before, options, program="evals.__main__")


def test_killed_evaluation_resumes_to_the_same_bits(whole, small, questions, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    command = ["hellaswag", str(small), *flags_of(output, questions)]
    assert start(0, tmp_path / "screen", command, kill_after, (2,)).wait() == [-signal.SIGKILL]
    (left,) = output.iterdir()
    assert left.name == f".hellaswag_{whole[0]['fingerprint'][:12]}.unfinished"
    n_done = left.read_bytes().count(b"\n") - 1
    assert 0 < n_done < N

    # Another model, in the same folder, takes nothing of it.
    gpt = load_model(small)
    with torch.no_grad():
        gpt.transformer.ln_f.bias.add_(1)
    write_model(tmp_path / "gpt2_other.bin", gpt)
    assert main(["hellaswag", str(tmp_path / "gpt2_other.bin"), *flags_of(output, questions)]) == 0
    assert results_of(output)[1] != whole[1] and left.exists()
    for path in output.glob("hellaswag_*"):
        path.unlink()
    capsys.readouterr()

    scored = []
    score_rows = score.score_rows
    monkeypatch.setattr(score, "score_rows", lambda *args: scored.append(len(args[1])) or score_rows(*args))
    assert main(command) == 0
    assert results_of(output) == whole and not left.exists()
    assert sum(scored) == 4 * (N - n_done)
    assert f"resuming: {n_done} of {N} items are done" in capsys.readouterr().out


def test_file_of_another_evaluation_is_not_taken(whole, small, questions, tmp_path):
    """Under the name of this one: the first line has the whole fingerprint."""
    left = tmp_path / f".hellaswag_{whole[0]['fingerprint'][:12]}.unfinished"
    lines = [json.dumps({"item": i, "scores": 4 * [[-1.0, True]]}) for i in range(N)]
    left.write_text("\n".join(['{"fingerprint": "0"}', *lines]) + "\n")
    assert main(["hellaswag", str(small), *flags_of(tmp_path, questions)]) == 0
    assert results_of(tmp_path)[1] == whole[1]


@pytest.mark.parametrize("line", ['{"item": 7, "scores": S}', '{"item": 0, "scores": [[1, true]]}', "x", '{"item": 0}'])
def test_damaged_lines_are_scored_again(whole, questions, tmp_path, line):
    task = open_hellaswag(questions)
    kept = progress.Progress(tmp_path, task, whole[0]["fingerprint"])
    with contextlib.ExitStack() as held:
        assert kept.open(held) == {}
        kept.keep({3: whole[1][3]})
        good = kept.path.read_bytes()
    damaged = line.replace("S", json.dumps(4 * [[-1.0, True]])).encode() + b"\n"
    kept.path.write_bytes(good + damaged + progress._lines({5: whole[1][5]}))
    with contextlib.ExitStack() as held:
        assert kept.open(held) == {3: whole[1][3]}
        assert kept.path.read_bytes() == good


def test_two_ranks_give_the_figures_of_one(whole, small, questions, tmp_path):
    command = ["hellaswag", str(small), *flags_of(tmp_path / "out", questions)]
    processes = start(2, tmp_path / "screen", command)
    assert processes.wait() == [0, 0], processes.errors
    assert results_of(tmp_path / "out") == whole
    assert processes.screen.count("hellaswag (llm.c)") == 1


# The network


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A stand-in for the network, which gives or raises something, and an empty folder for downloads."""
    monkeypatch.setattr(read, "FOLDER", tmp_path / "downloads")

    def stand_in(answer, sha256=None):
        def urlopen(url, timeout):
            if isinstance(answer, Exception):
                raise answer
            return answer if hasattr(answer, "read") else io.BytesIO(answer)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        if sha256:
            url = "https://example.org/file" + (".zip" if sha256 == "zip" else ".jsonl")
            digest = hashlib.sha256(answer).hexdigest() if isinstance(answer, bytes) else "0"
            monkeypatch.setattr(read, "SOURCES", dict.fromkeys(read.SOURCES, read.Source(url, digest)))

    return stand_in


def test_download_once(network, questions, tmp_path):
    network(questions.read_bytes(), "jsonl")
    path = read.fetch("hellaswag")
    assert path.read_bytes() == questions.read_bytes() and list(path.parent.iterdir()) == [path]
    network(AssertionError("it is there"))
    assert read.fetch("hellaswag") == path
    path.write_text("{}")
    with pytest.raises(read.BadInput, match="is damaged: its SHA-256 sum"):
        read.fetch("hellaswag")


def test_archive(network, tmp_path, small):
    content = io.BytesIO()
    text = made.wikitext(tmp_path / "w.raw", 1).read_text(encoding="utf-8")
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", text)
    network(content.getvalue(), "zip")
    assert read.read_member(read.fetch("wikitext"), "wikitext-2-raw/wiki.test.raw") == text
    with pytest.raises(read.BadInput, match="no archive with other in it"):
        read.read_member(read.fetch("wikitext"), "other")


class Short(io.BytesIO):
    """An answer that ends before its length."""

    length = 100


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (urllib.error.URLError("Name or service not known"), "cannot be fetched from https://.*known"),
        (TimeoutError("timed out"), "cannot be fetched from https://.*timed out"),
        (http.client.IncompleteRead(b"First", 1000), "cannot be fetched from https://"),
        (Short(b"half"), "cannot be fetched from https://.*96 more expected"),
        (b"another file", "has the SHA-256 sum [0-9a-f]{64} instead of 0aa3b8"),
    ],
)
def test_download_that_fails(network, tmp_path, capsys, small, answer, told):
    network(answer)
    assert_refused(["hellaswag", str(small)], capsys, told)
    assert not (tmp_path / "downloads").exists()


# Refused


def assert_refused(argv: list[str], capsys, told: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evals: ")
    assert re.search(told, line), line


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("hellaswag MODEL --limit 0", "--limit: 0 is no whole number from 1"),
        ("hellaswag MODEL --limit ٣", "--limit: ٣ is no whole number|--limit: "),
        ("hellaswag MODEL --batch_size -1", "--batch_size: -1 is no whole number"),
        ("hellaswag MODEL --data nowhere.jsonl", "cannot read nowhere.jsonl: No such file"),
        ("hellaswag MODEL --data nowhere.bin", "cannot read nowhere.bin: No such file"),
        ("hellaswag MODEL --data=", '--data is ""'),
        ("hellaswag TINY --data QUESTIONS", "the model has a vocabulary of 61 tokens"),
        ("hellaswag", "no MODEL is given"),
        ("hellaswag nowhere --data QUESTIONS", "^evals: nowhere is neither a path nor a name"),
        ("hellaswag nowhere.bin --data QUESTIONS", "^evals: nowhere.bin: cannot be read: No such file"),
        ("hellaswag . --data QUESTIONS", r"^evals: \.: cannot load this folder"),
        ("hellaswag MODEL --data MODEL", "magic number 20240326 instead of 20240522"),
        ("hellaswag MODEL --data QUESTIONS --backend nobody", "--backend nobody: unknown backend"),
        ("hellaswag MODEL --data QUESTIONS --device tpu", "--device tpu is unknown"),
        ("hellaswag MODEL --data QUESTIONS --output_dir QUESTIONS", "cannot write .*h.jsonl"),
        ("lambada MODEL --rule lm-eval", "--rule is of hellaswag alone"),
        ("bpb --write_bin x", "--write_bin is of hellaswag alone"),
        ("bpb MODEL --data nothing_*.bin", "no shard matches nothing_"),
        ("mmlu MODEL", "invalid choice: 'mmlu'"),
        ("hellaswag --write_bin QUESTIONS --data QUESTIONS", "exists already"),
    ],
)
def test_refused(small, tiny, questions, capsys, argv, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(small), "TINY": tiny["--model"], "QUESTIONS": str(questions)}
    assert_refused([names.get(word, word) for word in argv.split()], capsys, told)
    assert list(tmp_path.iterdir()) == []


def test_two_at_the_same_evaluation(whole, small, questions, tmp_path, capsys):
    task = open_hellaswag(questions)
    with contextlib.ExitStack() as held:
        progress.Progress(tmp_path, task, whole[0]["fingerprint"]).open(held)
        assert_refused(["hellaswag", str(small), *flags_of(tmp_path, questions)], capsys, "another run writes to it")


def test_write_bin(questions, tmp_path, capsys):
    path = tmp_path / "hellaswag_val.bin"
    assert main(["hellaswag", "--write_bin", str(path), "--data", str(questions)]) == 0
    assert open_hellaswag(path).digest() == open_hellaswag(questions).digest()
    assert f"{path}: {N} questions for llm.c" in capsys.readouterr().out
