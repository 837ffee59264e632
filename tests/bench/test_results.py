"""Rows on disk, what moved between two of them, and which are older than their kernel."""

import subprocess

import pytest

from bench import __main__ as cli
from bench import results
from bench.results import Row, folder, moved, read, write
from common import BadInput


def row(variant="triton", p50=1.0, spread=0.05, **others) -> Row:
    times = {"p20": p50 - spread, "p50": p50, "p80": p50 + spread}
    return Row("gelu", "forward", variant, "8×16", "bfloat16", **times | others)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(bytes=10**12, flops=3, percent=91.25, gpu="NVIDIA Fake 1", commit="abc+"),
        row("eager", p20=None, p50=1.0, p80=None),
        Row("gelu", "forward", "liger", "8×16", "bfloat16", note='failed: "x", y'),
    ]
    write(tmp_path / "new" / "gelu.csv", rows)
    assert read(tmp_path / "new" / "gelu.csv") == read(tmp_path / "new") == results.measured(tmp_path) == rows
    assert folder("NVIDIA H100 80GB HBM3", tmp_path) == tmp_path / "nvidia-h100-80gb-hbm3"


def test_a_second_measurement_on_the_same_gpu_replaces_the_first(tmp_path):
    write(tmp_path / "gelu.csv", [row(p50=1.0), row(gpu="A100", p50=3.0), row("eager", p50=4.0)])
    write(tmp_path / "gelu.csv", [row(p50=2.0)])
    times = {(r.variant, r.gpu): r.p50 for r in read(tmp_path / "gelu.csv")}
    assert times == {("triton", ""): 2.0, ("triton", "A100"): 3.0, ("eager", ""): 4.0}


def test_what_is_not_ours_or_not_there_is_refused(tmp_path):
    for text in ("", "a,b\n1,2\n"):
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(BadInput, match=r"other\.csv"):
            read(tmp_path / "other.csv")
    (tmp_path / "other.csv").unlink()
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(BadInput, match="no rows"):
            read(path)


def test_what_moved_lies_outside_of_both_spreads():
    before = [row(variant, spread=0.125) for variant in ("same", "touching", "slower", "faster", "gone", "failed")]
    before.append(Row("step part", "idle", "triton", "d12", "bfloat16", p50=1.0))
    after = [
        row("same", p50=1.125, spread=0.125),
        row("touching", p50=1.25, spread=0.125),
        row("slower", p50=1.375, spread=0.125),
        row("faster", p50=0.625, spread=0.125),
        row("new", p50=9.0),
        Row("gelu", "forward", "failed", "8×16", "bfloat16", note="failed"),
        Row("step part", "idle", "triton", "d12", "bfloat16", p50=9.0),
    ]
    assert [(b.variant, ratio) for _, b, ratio in moved(before, after)] == [("slower", 1.375), ("faster", 0.625)]


def test_compare_prints_what_moved_and_fails_on_what_got_slower(tmp_path, capsys):
    def compare(before, after) -> int:
        return cli.main(["compare", *(str(tmp_path / f"{name}.csv") for name in (before, after))])

    write(tmp_path / "a.csv", [row(p50=1.0), row("eager", p50=4.0), row("old", p50=1.0)])
    write(tmp_path / "b.csv", [row(p50=1.5), row("eager", p50=2.0)])
    write(tmp_path / "c.csv", [row("eager", p50=2.0)])
    assert compare("a", "b") == 1
    out = capsys.readouterr().out
    assert "+50.0%" in out and "-50.0%" in out and "2 rows in both; 1 slower and 1 faster" in out
    assert (compare("a", "a"), compare("a", "c")) == (0, 0)
    with pytest.raises(SystemExit) as stopped:
        compare("a", "none")
    assert stopped.value.code == 2 and "none.csv" in capsys.readouterr().err


def test_a_row_is_stale_once_its_kernel_changed(tmp_path):
    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        done = subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def change(name) -> str:
        with open(tmp_path / "kernels" / name, "a") as file:
            file.write("x\n")
        git("add", ".")
        git("commit", "-qm", name)
        results._last_commit.cache_clear()
        return git("rev-parse", "--short", "HEAD")

    def is_stale(commit, op="gelu", variant="triton") -> bool:
        return results.is_stale(Row(op, "forward", variant, "8×16", "bfloat16", commit=commit), tmp_path)

    git("init", "-q")
    (tmp_path / "kernels").mkdir()
    first, other = change("gelu.py"), change("attention.py")
    assert not is_stale(first) and not is_stale(other)
    assert is_stale(first + "+")  # what was measured was not this commit
    second = change("gelu.py")
    assert is_stale(other) and not is_stale(second)
    assert not is_stale(first, variant="eager")  # torch's kernels do not change with ours
    of_head = change("cross_entropy.py")
    assert not is_stale(of_head, "linear_cross_entropy")  # which is in the same file
    change("cross_entropy.py")
    assert is_stale(of_head, "linear_cross_entropy") and not is_stale(second)
    change("launch.py")  # launch parameters are part of every kernel
    assert is_stale(second)
