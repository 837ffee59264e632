"""docs/kernels.md and its pictures state what the kernels launch today."""

import functools
import shutil
from itertools import combinations
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from common import BadInput
from docs import launches
from docs.canvas import SETTINGS, WIDTH
from docs.draw_kernels import DOCUMENT, DRAWN, PICTURES
from kernels import launch

picture_of = functools.cache(lambda name: DRAWN[name]())
RUN = "run python -m docs.draw_kernels"


def words_of(svg):
    """All text of a picture, in its order."""
    texts = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return " ".join("".join(text.itertext()) for text in texts).split()


def test_numbers_are_those_of_the_launchers(tmp_path):
    written = tmp_path / "kernels.md"
    shutil.copy(DOCUMENT, written)
    launches.put_numbers(written)
    assert written.read_text() == DOCUMENT.read_text(), RUN


@pytest.mark.parametrize("name", DRAWN)
def test_picture_says_what_would_be_drawn(name, tmp_path):
    drawn, committed = tmp_path / "drawn.svg", PICTURES / f"{name}.svg"
    picture_of(name).save(drawn)
    assert words_of(drawn) == words_of(committed), RUN
    assert f"(pictures/{name}.svg)" in DOCUMENT.read_text()


def test_every_picture_is_drawn():
    assert {path.stem for path in PICTURES.iterdir()} == set(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_no_words_overlap(name):
    """Numbers in pictures change with launch.py, and so does their width."""
    picture = picture_of(name)
    with matplotlib.rc_context(SETTINGS):
        renderer = FigureCanvasAgg(picture.figure).get_renderer()
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in picture.texts()]
    canvas = picture.figure.bbox
    assert [words for words, box in boxes if box.x0 < 0 or box.x1 > canvas.x1 or box.y0 < 0 or box.y1 > canvas.y1] == []
    pairs = ((a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.padded(-0.5).overlaps(other.padded(-0.5)))
    assert list(pairs) == []
    assert picture.figure.get_figwidth() * 72 == WIDTH


def test_other_blocks_change_numbers_and_picture(tmp_path):
    config = launch.LaunchConfig("attention", 0, 128, 8, 64, 32, 4, 2)
    with launch.Trial(config):
        assert "| 64 | 32 |" in launches.numbers("attention_forward")
        DRAWN["attention_forward"]().save(tmp_path / "drawn.svg")
    assert words_of(tmp_path / "drawn.svg") != words_of(PICTURES / "attention_forward.svg")


def test_document_without_markers_is_refused(tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text("# Kernels\n")
    with pytest.raises(BadInput, match=r"kernels\.md has no lines <!-- written by python -m docs\.draw_kernels: gelu"):
        launches.put_numbers(document)
