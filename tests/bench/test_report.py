"""The table of README and the pictures, from rows alone."""

import pytest

from bench import report
from bench.results import Row, write
from common import BadInput

BEGIN, END = (f"<!-- written by python -m bench report: {what} -->" for what in ("begin", "end"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A README with markers, and a place for results."""
    readme = tmp_path / "README.md"
    readme.write_text(f"# Top\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    monkeypatch.setattr(report, "is_stale", lambda row: row.commit == "old")
    return readme, tmp_path / "results"


def measured(variant="triton", p50=0.3, **others) -> Row:
    return Row(
        **{"op": "gelu", "pass_name": "forward", "variant": variant, "shape": "65536×3072", "dtype": "bfloat16"}
        | {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50, "percent": 85.4, "gpu": "NVIDIA Fake 1", "commit": "new"}
        | others
    )


def test_without_a_gpu_one_line_says_so(folders, capsys):
    readme, results = folders
    report.main(readme, results)
    assert readme.read_text() == f"# Top\n\n{BEGIN}\n\nNothing has been measured on a GPU yet.\n\n{END}\n\nrest\n"
    assert "Nothing has been measured" in capsys.readouterr().out


def test_the_first_shape_of_an_op_and_every_step_beside_the_fastest_baseline(folders):
    readme, results = folders
    rows = [measured(), measured("compile", 0.35), measured("eager", 1.2), measured("copy", 0.26)]
    failed = measured("liger").with_(p20=None, p50=None, p80=None, percent=None, note="failed")
    left_out = [measured(shape="8192×3072"), measured(dtype="float32"), measured(pass_name="both")]
    write(results / "nvidia-fake-1" / "gelu.csv", [*rows, failed, *left_out])
    of_step = {"op": "step", "pass_name": "both"}
    steps = [measured(shape=shape, **of_step) for shape in ("d12 64×1024", "d12 16×1024")]
    others = [measured("triton + compile", 0.2, shape="d12 64×1024", **of_step)]
    others += [measured("sdpa", 0.9, shape="d12 64×1024", **of_step)]
    write(results / "nvidia-fake-1" / "step.csv", [*steps, *others, measured(op="step part", pass_name="matmul")])
    report.main(readme, results)
    lines = [line for line in readme.read_text().splitlines() if line.startswith(("| gelu", "| step"))]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["gelu", "forward", "65536×3072", "NVIDIA Fake 1", "0.3", "85%", "compile, 0.35 ms"],
        ["step", "both", "d12 64×1024", "NVIDIA Fake 1", "0.3", "85%", "sdpa, 0.9 ms"],
        ["step", "both", "d12 16×1024", "NVIDIA Fake 1", "0.3", "85%", ""],
    ]


def test_a_row_older_than_its_kernel_is_marked(folders):
    readme, results = folders
    write(results / "nvidia-fake-1" / "gelu.csv", [measured(commit="old")])
    report.main(readme, results)
    assert "0.3 (older than the kernel)" in readme.read_text()


def test_writing_twice_changes_nothing(folders):
    readme, results = folders
    report.main(readme, results)
    once = readme.read_text()
    report.main(readme, results)
    assert readme.read_text() == once


def test_a_readme_without_markers_is_left_alone(folders):
    readme, results = folders
    readme.write_text("# Top\n")
    with pytest.raises(BadInput, match=r"README\.md has no lines"):
        report.main(readme, results)
    assert readme.read_text() == "# Top\n"


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_pictures_of_ops_and_of_the_step(folders):
    _, results = folders
    rows = [
        measured(variant, p50 * size, shape=f"65536×{768 * size}", pass_name=pass_name)
        for variant, p50 in (("triton", 0.1), ("eager", 0.5), ("copy", 0.08))
        for size in (1, 2, 4)
        for pass_name in ("forward", "backward", "both")
    ]
    write(results / "nvidia-fake-1" / "gelu.csv", rows)
    parts = [
        measured(variant, ms, op="step part", pass_name=part, shape="d12 64×1024", p20=None, p80=None)
        for variant in ("triton", "compile")
        for part, ms in (("matmul", 50.0), ("idle", 3.0))
    ]
    write(results / "nvidia-fake-1" / "step.csv", parts)
    drawn = report.draw(results)
    assert {path.name for path in drawn} == {
        "gelu-bfloat16-65536-rows.png",
        "step-part-bfloat16-d12-64x1024.png",
    }
    assert all(is_png(path) for path in drawn)


@pytest.mark.parametrize(
    ("op", "shape", "size"),
    [
        ("gelu", "65536×3072", 3072),
        ("attention", "64×1024×12×64", 1024),
        ("linear_cross_entropy", "8192×768×50257", 768),
    ],
)
def test_the_axis_of_a_picture(op, shape, size):
    assert report.size_of(Row(op, "both", "triton", shape, "bfloat16")) == size
