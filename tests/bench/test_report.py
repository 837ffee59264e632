"""The table of README and the pictures, from rows alone."""

import pytest

from bench import pictures, report, tables
from bench.results import Row, write
from common import BadInput


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A README with markers, and predictions for one op."""
    readme = tmp_path / "README.md"
    readme.write_text(f"# Top\n\n{tables.BEGIN}\nold\n{tables.END}\n\nrest\n")
    bound = Row("gelu", "forward", "roofline", "65536×3072", "bfloat16", p50=0.242, gpu="H100", note="predicted")
    others = [bound.with_(gpu="A100", p50=0.4), bound.with_(op="step part", pass_name="matmul", p50=50.0)]
    steps = [
        bound.with_(op="step", pass_name="both", variant=variant, shape="d12 64×1024")
        for variant in ("eager", "triton")
    ]
    write(tmp_path / "results" / "predicted" / "roofline.csv", [bound, *others, *steps])
    monkeypatch.setattr(report, "is_stale", lambda row: row.commit == "old")
    return readme, tmp_path / "results"


def measured(variant="triton", p50=0.3, **others) -> Row:
    return Row(
        **{"op": "gelu", "pass_name": "forward", "variant": variant, "shape": "65536×3072", "dtype": "bfloat16"}
        | {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50, "percent": 85.4, "gpu": "NVIDIA Fake 1", "commit": "new"}
        | others
    )


def test_without_a_gpu_the_table_says_so_and_shows_the_prediction(folders, capsys):
    readme, results = folders
    report.main(readme, results)
    text = readme.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| gelu")]
    assert len(lines) == 1 and "0.242" in lines[0] and "not yet measured on a GPU" in lines[0]
    assert "(predicted)" in text and "old" not in text
    assert text.startswith("# Top\n") and text.endswith("rest\n")
    assert len([line for line in text.splitlines() if line.startswith("| step")]) == 1  # ours
    assert "not yet measured on a GPU" in capsys.readouterr().out


def test_measured_rows_stand_beside_the_prediction_with_the_best_of_the_others(folders):
    readme, results = folders
    rows = [measured(), measured("compile", 0.35), measured("eager", 1.2), measured("copy", 0.26)]
    failed = measured("liger").with_(p20=None, p50=None, p80=None, percent=None, note="failed")
    write(results / "nvidia-fake-1" / "gelu.csv", [*rows, failed])
    report.main(readme, results)
    (line,) = (line for line in readme.read_text().splitlines() if line.startswith("| gelu"))
    for cell in ("0.242", "0.3 on NVIDIA Fake 1", "85%", "compile, 0.35 ms"):
        assert f"| {cell} " in line
    assert "older" not in line


def test_a_row_older_than_its_kernel_is_marked(folders):
    readme, results = folders
    write(results / "nvidia-fake-1" / "gelu.csv", [measured(commit="old")])
    report.main(readme, results)
    assert "0.3 on NVIDIA Fake 1 (older than the kernel)" in readme.read_text()


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


def test_bars_carry_their_numbers(tmp_path):
    canvas, (left, right) = pictures.figure(6, 2, 2)
    pictures.grouped_bars(left, ["a", "b"], {"x": [1.0, None], "y": [2.0, 3.0]}, "{:.1f}")
    pictures.stacked_bars(right, ["a", "b"], {"x": [1.0, 2.0], "y": [2.0, 3.0]}, "{:.1f}")
    texts = {text.get_text().strip() for ax in (left, right) for text in ax.texts}
    assert {"1.0", "2.0", "3.0", "5.0"} <= texts
    pictures.save(canvas, tmp_path / "new" / "bars.png")
    assert is_png(tmp_path / "new" / "bars.png")
