"""The command line, and how timing resumes where it stopped."""

import pytest
import torch

from bench import __main__ as cli
from bench import harness, ops, results, variants
from bench.results import Row, read
from tests.conftest import needs_interpreter


def test_alone_it_lists_what_there_is(capsys):
    assert cli.main([]) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()] == list(cli.COMMANDS)


@needs_interpreter
@pytest.mark.parametrize(
    ("has_gpu", "said"),
    [(False, "kernels needs an NVIDIA GPU"), (True, "kernels: in this process triton kernels are interpreted already")],
)
def test_what_times_says_in_a_line_what_it_needs(has_gpu, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["kernels"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bench: {said}")


@pytest.fixture
def timing(device, toy, tmp_path, monkeypatch):
    """`time_kernels` over three toy ops; each case takes 60 seconds of a clock that is returned with it."""
    one = toy()
    benchmarks = [one._replace(op=op, dtypes=(torch.bfloat16,)) for op in ("a", "b", "c")]
    monkeypatch.setattr(ops, "BENCHMARKS", benchmarks)

    now = [0.0]
    measured = []

    def measure(benchmark, shape, dtype, device):
        now[0] += 60.0
        measured.append(benchmark.op)
        return [Row(benchmark.op, "forward", "triton", shape.name, "bfloat16", 1.0, 1.0, 1.0, commit=results.commit())]

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(results, "commit", lambda: "c1")

    def run(names=("all",), minutes=100.0) -> list[str]:
        measured.clear()
        cli.time_kernels(names, now[0] + 60 * minutes, device, tmp_path, now=lambda: now[0])
        return list(measured)

    return run


def test_it_stops_in_time_and_resumes(timing, tmp_path, capsys):
    assert timing(["b"]) == ["b"]
    assert [row.op for row in read(tmp_path / "nvidia-fake-1" / "b.csv")] == ["b"]
    assert timing(minutes=1.5) == ["a"]
    assert "1 of 3 cases are left" in capsys.readouterr().out
    assert timing() == ["c"]
    assert "all cases are measured" in capsys.readouterr().out
    assert timing() == []
    with pytest.raises(cli.BadInput, match="unknown op 'gelo'; choose from a, b, c, or all"):
        timing(["gelo"])


def test_another_commit_is_measured_again(timing, monkeypatch):
    assert timing(["a"]) == ["a"]
    for commit, measured_again in (("c2", []), ("c2+", ["a"])):
        monkeypatch.setattr(results, "commit", lambda commit=commit: commit)
        assert timing(["a"]) == ["a"]
        assert timing(["a"]) == measured_again


def test_the_step_is_written_and_not_measured_twice(device, tmp_path, monkeypatch):
    calls = []

    def measure(preset, tokens, dtype, device, names, chrome_trace):
        calls.append((preset, tokens, dtype, list(names)))
        return [Row("step", "both", "triton", variants.shape_name(preset, tokens), "bfloat16", commit=results.commit())]

    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(results, "commit", lambda: "c1")
    arguments = cli.parser().parse_args(["all", "--batch_size", "2", "--sequence_length", "8"])
    for _ in range(2):
        cli.time_step(arguments, device, tmp_path)
    assert calls == [("d12", (2, 8), torch.bfloat16, list(variants.VARIANTS))]
    assert len(read(tmp_path / "nvidia-fake-1" / "step.csv")) == 1
    calls.clear()
    cli.time_step(cli.parser().parse_args(["all"]), device, tmp_path)
    assert [tokens for _, tokens, _, _ in calls] == [(B, 1024) for B in variants.BATCH_SIZES]
    for words, said in ((["step", "fast"], "unknown variant 'fast'"), (["step", "--model", "d13"], "--model d13")):
        with pytest.raises(cli.BadInput, match=said):
            cli.time_step(cli.parser().parse_args(words), device, tmp_path)
