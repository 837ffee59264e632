"""The command line, and how timing resumes where it stopped."""

import pytest
import torch

from bench import __main__ as cli
from bench import harness, ops, results, variants
from bench.results import Row, read, write
from tests.conftest import needs_interpreter


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_alone_it_lists_what_there_is(capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == list(cli.COMMANDS)
    (commands,) = (action.choices for action in cli.parser()._actions if action.dest == "command")
    assert list(commands) == list(cli.COMMANDS)


@pytest.mark.parametrize("command", ["kernels", "step", "all"])
def test_what_times_says_in_a_line_that_it_needs_a_gpu(command, no_gpu, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bench: {command} ") and "needs an NVIDIA GPU" in line


@needs_interpreter
def test_what_times_says_in_a_line_that_the_kernels_are_interpreted(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["step"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench: step: in this process triton kernels are interpreted already")


def test_nothing_to_compare_is_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert stopped.value.code == 2
    assert str(tmp_path / "a.csv") in capsys.readouterr().err


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


def test_all_ops_or_those_that_are_named(timing, tmp_path):
    assert timing(["b"]) == ["b"]
    assert [row.op for row in read(tmp_path / "nvidia-fake-1" / "b.csv")] == ["b"]
    assert timing() == ["a", "c"]


def test_it_stops_in_time_and_resumes(timing, capsys):
    assert timing(minutes=2.5) == ["a", "b"]
    assert "1 of 3 cases are left" in capsys.readouterr().out
    assert timing(minutes=2.5) == ["c"]
    assert "all cases are measured" in capsys.readouterr().out
    assert timing() == []


def test_another_commit_is_measured_again(timing, monkeypatch):
    assert timing(["a"]) == ["a"]
    monkeypatch.setattr(results, "commit", lambda: "c2")
    assert timing(["a"]) == ["a"]
    assert timing(["a"]) == []
    monkeypatch.setattr(results, "commit", lambda: "c2+")
    assert timing(["a"]) == ["a"]
    assert timing(["a"]) == ["a"]


def test_an_unknown_op_is_bad_input(timing):
    with pytest.raises(cli.BadInput, match="unknown op 'gelo'; choose from a, b, c, or all"):
        timing(["gelo"])


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
    with pytest.raises(cli.BadInput, match="unknown variant 'fast'"):
        cli.time_step(cli.parser().parse_args(["step", "fast"]), device, tmp_path)


def test_an_unknown_preset_is_bad_input(device):
    with pytest.raises(cli.BadInput, match="--model d13"):
        cli.time_step(cli.parser().parse_args(["step", "--model", "d13"]), device)


def test_compare_from_the_command_line(tmp_path):
    rows = [Row("gelu", "forward", "triton", "8", "bfloat16", 1.0, 1.0, 1.0)]
    write(tmp_path / "a.csv", rows)
    write(tmp_path / "b.csv", [row.with_(p20=2.0, p50=2.0, p80=2.0) for row in rows])
    assert cli.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 1
    assert cli.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "a.csv")]) == 0
