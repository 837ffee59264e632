"""Rows on disk, what moved between two of them, and which are older than their kernel."""

import subprocess

import pytest

from bench import results
from bench.results import Row, compare, folder, is_stale, moved, read, write
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
    assert read(tmp_path / "new" / "gelu.csv") == rows
    assert read(tmp_path / "new") == rows


def test_the_columns_are_flat_and_named(tmp_path):
    write(tmp_path / "gelu.csv", [row()])
    header = (tmp_path / "gelu.csv").read_text().splitlines()[0]
    assert header == (
        "op,pass_name,variant,shape,dtype,p20,p50,p80,bytes,flops,percent,gpu,driver,torch,triton,commit,note"
    )


def test_a_second_measurement_replaces_the_first_and_leaves_the_others(tmp_path):
    write(tmp_path / "gelu.csv", [row(p50=1.0), row("eager", p50=4.0)])
    write(tmp_path / "gelu.csv", [row(p50=2.0)])
    assert {r.variant: r.p50 for r in read(tmp_path / "gelu.csv")} == {"triton": 2.0, "eager": 4.0}


def test_two_gpus_may_share_a_file(tmp_path):
    rows = [row(gpu="A100", p50=2.0), row(gpu="H100")]
    write(tmp_path / "gelu.csv", rows)
    assert read(tmp_path / "gelu.csv") == rows


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_files_of_others_are_refused(tmp_path, text):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(BadInput, match=r"other\.csv"):
        read(tmp_path / "other.csv")


def test_nothing_to_read_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no rows"):
        read(tmp_path)
    with pytest.raises(BadInput, match="no rows"):
        read(tmp_path / "none.csv")


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
    write(tmp_path / "a.csv", [row(p50=1.0), row("eager", p50=4.0), row("old", p50=1.0)])
    write(tmp_path / "b.csv", [row(p50=1.5), row("eager", p50=2.0)])
    assert compare(tmp_path / "a.csv", tmp_path / "b.csv") == 1
    out = capsys.readouterr().out
    assert "+50.0%" in out and "-50.0%" in out and "2 rows in both; 1 slower and 1 faster" in out
    assert compare(tmp_path / "a.csv", tmp_path / "a.csv") == 0
    assert "0 slower and 0 faster" in capsys.readouterr().out
    write(tmp_path / "c.csv", [row("eager", p50=2.0)])
    assert compare(tmp_path / "a.csv", tmp_path / "c.csv") == 0


def test_a_gpu_has_a_folder(tmp_path):
    assert folder("NVIDIA H100 80GB HBM3", tmp_path) == tmp_path / "nvidia-h100-80gb-hbm3"


def test_all_that_was_measured(tmp_path):
    assert results.measured(tmp_path) == []
    write(tmp_path / "nvidia-fake-1" / "gelu.csv", [row()])
    (tmp_path / "no-rows").mkdir()
    assert results.measured(tmp_path) == [row()]


@pytest.fixture
def repository(tmp_path):
    """Commits of a kernel file, oldest first, and a way to make more."""

    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        done = subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def change(name) -> str:
        (tmp_path / "kernels").mkdir(exist_ok=True)
        path = tmp_path / "kernels" / name
        path.write_text(path.read_text() + "x\n" if path.exists() else "x\n")
        git("add", ".")
        git("commit", "-qm", name)
        return git("rev-parse", "--short", "HEAD")

    git("init", "-q")
    return tmp_path, change


def test_a_row_is_stale_once_its_kernel_changed(repository):
    root, change = repository
    first = change("gelu.py")
    other = change("attention.py")
    assert not is_stale(row(commit=first), root)
    assert not is_stale(row(commit=other), root)
    change("gelu.py")
    results._last_commit.cache_clear()
    assert is_stale(row(commit=other), root)
    assert not is_stale(row("eager", commit=first), root)  # torch's kernels do not change with ours


def test_a_row_of_a_fused_op_follows_the_file_that_it_is_in(repository):
    root, change = repository
    commit = change("cross_entropy.py")
    change("linear_cross_entropy.py")
    head = Row("linear_cross_entropy", "both", "triton", "8", "bfloat16", commit=commit)
    results._last_commit.cache_clear()
    assert not is_stale(head, root)
    change("cross_entropy.py")
    results._last_commit.cache_clear()
    assert is_stale(head, root)


def test_launch_parameters_are_part_of_every_kernel(repository):
    root, change = repository
    commit = change("gelu.py")
    change("launch.py")
    results._last_commit.cache_clear()
    assert is_stale(row(commit=commit), root)


def test_what_was_measured_on_an_uncommitted_tree_is_stale(repository):
    root, change = repository
    results._last_commit.cache_clear()
    assert is_stale(row(commit=change("gelu.py") + "+"), root)
