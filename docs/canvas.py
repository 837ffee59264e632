"""The look of the pictures in docs/kernels.md: one width, one font, one colour per meaning.

A unit is a point, y grows downwards. Text stays text in the SVG, so that it can be searched, and compared by a test.
"""

import io
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.text import Text

from common import atomic_write

WIDTH = 640
MARGIN = 14
FULL = WIDTH - 2 * MARGIN
INK, MUTED, PAPER = "#1f2937", "#5b6472", "#fcfcfa"
Rect = tuple[float, float, float, float]
"""left, top, width, height"""


class Look(NamedTuple):
    """How one kind of thing is drawn."""

    fill: str
    edge: str
    faint: str
    """fill of the same thing, where another program has it"""
    meaning: str


LOOKS = {
    "read": Look("#8fbcf7", "#1f6feb", "#dbe9fd", "read"),
    "written": Look("#8fd6a5", "#15803d", "#dcf3e3", "written"),
    "saved": Look("#c4aef2", "#7c3aed", "#ebe4fb", "written, and saved for backward"),
    "sums": Look("#fbc46a", "#b45309", "#fdebcb", "sums in fp32"),
    "masked": Look("#f4a3b5", "#be185d", "#fbdde4", "with a mask"),
    "skipped": Look("#e8eaee", "#bcc3cd", "#f4f5f7", "never computed"),
    "buffer": Look("#8ad6dc", "#0e7490", "#d9f2f4", "overwritten in place"),
    "values": Look("#ffffff", "#5b6472", "#ffffff", "on chip only"),
}
PANELS = {"memory": ("#eaf0f7", "#b6c6da"), "chip": ("#fdf4df", "#e0c78c")}
FONTS = ("DejaVu Sans", "Verdana", "Arial")
"""the last two are narrower, so what fits in the first one fits"""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "docs",  # ids depend on the picture alone
    "font.family": "sans-serif",
    "font.sans-serif": FONTS,
    "path.simplify": False,
}


class Picture:
    """A figure with a title, to which shapes and texts are added.

    Args:
        title: of the picture.
        subtitle: the shapes that it shows.
        height: in points.
    """

    def __init__(self, title: str, subtitle: str, height: float):
        self.figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self.height = height
        self.text(MARGIN, 20, title, size=13, bold=True)
        self.text(MARGIN, 37, subtitle, colour=MUTED)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 8.5,
        ha: str = "left",
        bold: bool = False,
        colour: str = INK,
        turned: bool = False,
    ) -> None:
        """Words whose lower-case letters have their middle at y; `turned` by a quarter to the left."""
        several = turned or "\n" in words
        self.axes.text(
            *(x, y if several else y + 0.35 * size, words),
            fontsize=size,
            ha=ha,
            va="center" if several else "baseline",
            color=colour,
            fontweight="bold" if bold else "normal",
            rotation=90 if turned else 0,
            rotation_mode="anchor",
            parse_math=False,
            linespacing=1.35,
        )

    def lines(self, x: float, y: float, words: Sequence[str], size: float = 8.5, step: float = 13) -> None:
        """Lines of text from the top; (x, y) is the middle of the first one's left end."""
        for i, line in enumerate(words):
            self.text(x, y + i * step, line, size)

    def panel(self, rect: Rect, kind: str, title: str) -> None:
        """A place where data is: device memory, or a chip."""
        fill, edge = PANELS[kind]
        x, y, w, h = rect
        shape = FancyBboxPatch(
            *((x + 4, y + 4), w - 8, h - 8),
            boxstyle="round,pad=4",
            facecolor=fill,
            edgecolor=edge,
            linewidth=0.8,
            clip_on=False,
        )
        self.axes.add_patch(shape)
        self.text(x + 9, y + 12, title, bold=True, colour=MUTED)

    def boxes(self, kind: str, rects: Iterable[Rect], faint: bool = False, line: float = 0.7) -> None:
        """Tiles of one kind, as one path."""
        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)] for x, y, w, h in rects]
        if corners:
            codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * len(corners)
            look = LOOKS[kind]
            self._path(
                [point for box in corners for point in box], codes, look.faint if faint else look.fill, look.edge, line
            )

    def box(self, kind: str, rect: Rect, words: str = "", size: float = 8.5, faint: bool = False) -> None:
        """One tile, with words in its middle."""
        self.boxes(kind, [rect], faint)
        if words:
            self.text(rect[0] + rect[2] / 2, rect[1] + rect[3] / 2, words, size, ha="center")

    def line(self, *points: tuple[float, float], colour: str = INK, width: float = 0.8, dashed: bool = False) -> None:
        """A line through points."""
        codes = [Outline.MOVETO, *[Outline.LINETO] * (len(points) - 1)]
        self._path(points, codes, "none", colour, width, "--" if dashed else "-")

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """A line with a head at its last point; its last piece is horizontal or vertical."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        back = x - 5 * dx, y - 5 * dy
        self.line(*points[:-1], back, colour=colour, width=1.0)
        head = [(x, y), (back[0] + 2.6 * dy, back[1] + 2.6 * dx), (back[0] - 2.6 * dy, back[1] - 2.6 * dx), (x, y)]
        self._path(head, [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY], colour, colour, 0.5)

    def column_sums(self, rect: Rect, n_rows: int, step: int, n_programs: int, result: float) -> None:
        """Partial sums, and what one of the programs makes of them that add `step` rows at a time, each in a strip of
        columns. `result` is the top of the sums."""
        x, y, w, h = rect
        scale, strip = h / n_rows, w / n_programs
        left = x + n_programs * 3 // 8 * strip
        self.boxes("sums", [rect], faint=True)
        self.boxes(
            "sums", [(left, y + s * scale, strip, min(step, n_rows - s) * scale) for s in range(0, n_rows, step)]
        )
        self.arrow((left + strip / 2, y + h), (left + strip / 2, result))
        self.boxes("written", [(x, result, w, 5)], faint=True)
        self.boxes("written", [(left, result, strip, 5)])

    def legend(self, *kinds: str) -> None:
        """What the colours mean, along the bottom."""
        x, y = float(MARGIN), self.height - 15
        for kind in kinds:
            self.boxes(kind, [(x, y - 5, 14, 10)])
            self.text(x + 19, y, LOOKS[kind].meaning, 8)
            x += 34 + 4.9 * len(LOOKS[kind].meaning)

    def texts(self) -> list[Text]:
        """All words, in the order in which they were added."""
        return list(self.axes.texts)

    def save(self, path: Path) -> None:
        """Write an SVG, the same bytes every time with one version of matplotlib."""
        buffer = io.BytesIO()
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a fallback font need not be here
        with matplotlib.rc_context(SETTINGS):
            self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        with atomic_write(path) as file:
            file.write(_shorten(buffer.getvalue().decode()).encode())

    def _path(
        self,
        points: Sequence[tuple[float, float]],
        codes: list,
        fill: str,
        edge: str,
        width: float,
        style: str = "-",
    ) -> None:
        shape = PathPatch(
            Outline(points, codes), facecolor=fill, edgecolor=edge, linewidth=width, linestyle=style, clip_on=False
        )
        self.axes.add_patch(shape)


def _shorten(svg: str) -> str:
    """Say the font once instead of at each text, and write paths without line breaks: half of the bytes."""
    family = ", ".join([*(f"'{font}'" for font in FONTS), "sans-serif"])
    svg = svg.replace(f" font-family: {family};", "").replace("*{stroke", f"text{{font-family: {family}}} *{{stroke", 1)
    svg = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", svg)
    return re.sub(r" *\n(?=[MLQz])", "", svg)
