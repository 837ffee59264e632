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
    for _ in range(2):
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
    steps = [measured(shape="d12 64×1024", **of_step), measured(shape="d12 16×1024", commit="old", **of_step)]
    others = [measured("triton + compile", 0.2, shape="d12 64×1024", **of_step)]
    others += [measured("sdpa", 0.9, shape="d12 64×1024", **of_step)]
    write(
        results / "nvidia-fake-1" / "step.csv",
        [*steps, *others, measured(op="step part", pass_name="matmul", shape="d12 64×1024")],
    )
    report.main(readme, results)
    lines = [line for line in readme.read_text().splitlines() if line.startswith(("| gelu", "| step"))]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["gelu", "forward", "65536×3072", "NVIDIA Fake 1", "0.3", "85%", "compile, 0.35 ms"],
        ["step", "both", "d12 64×1024", "NVIDIA Fake 1", "0.3", "85%", "sdpa, 0.9 ms"],
        ["step", "both", "d12 16×1024", "NVIDIA Fake 1", "0.3 (older than the kernel)", "85%", ""],
    ]
    pictures = {path.name: path.read_bytes() for path in results.glob("*/*.png")}
    ops = {f"gelu-{of}-rows.png" for of in ("bfloat16-65536", "bfloat16-8192", "float32-65536")}
    assert set(pictures) == ops | {"step-part-bfloat16-d12-64x1024.png"}
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in pictures.values())


def test_a_readme_without_markers_is_left_alone(folders):
    readme, results = folders
    readme.write_text("# Top\n")
    with pytest.raises(BadInput, match=r"README\.md has no lines"):
        report.main(readme, results)
    assert readme.read_text() == "# Top\n"
