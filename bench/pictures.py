"""Pictures of rows that a GPU gave, as PNG."""

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench.results import OURS, Row
from common import atomic_write

COLOURS = ("#1f6feb", "#d97706", "#15803d", "#b91c1c", "#7c3aed", "#0e7490", "#a16207", "#be185d", "#4b5563", "#94a3b8")


def op_picture(rows: Iterable[Row], path: Path, size_of: Callable[[Row], int]) -> None:
    """Time and percentage of the ceiling over size: one line per variant, one row of axes per pass.

    Args:
        rows: of one op, dtype and GPU.
        path: of the PNG.
        size_of: a row's place on the axis, from its shape.
    """
    rows = [row for row in rows if row.p50 is not None]
    passes = [name for name in ("forward", "backward", "both") if any(row.pass_name == name for row in rows)]
    variants = sorted({row.variant for row in rows}, key=lambda variant: (variant != OURS, variant))
    canvas, grid = plt.subplots(len(passes), 2, figsize=(10, 2.6 * len(passes)), layout="constrained", squeeze=False)
    for axes, pass_name in zip(grid, passes, strict=True):
        for i, variant in enumerate(variants):
            mine = [row for row in rows if (row.variant, row.pass_name) == (variant, pass_name)]
            if not mine:
                continue
            line = sorted((size_of(row), row.p20, row.p50, row.p80, row.percent) for row in mine)
            size, p20, p50, p80, percent = zip(*line, strict=True)
            style = {"color": COLOURS[i % len(COLOURS)], "marker": "o", "markersize": 3}
            style["linewidth"] = 2.2 if variant == OURS else 1.1
            axes[0].plot(size, p50, label=variant, **style)
            axes[0].fill_between(size, p20, p80, color=style["color"], alpha=0.15, linewidth=0)
            if None not in percent:
                axes[1].plot(size, percent, label=variant, **style)
        axes[0].set_yscale("log")
        axes[0].set_ylabel(f"{pass_name}\nms")
        axes[1].set_ylabel("% of the ceiling")
        for ax in axes:
            ax.set_xscale("log", base=2)
            ax.grid(alpha=0.25)
    canvas.suptitle(f"{rows[0].op}, {rows[0].dtype}, {rows[0].gpu}", fontsize=11)
    _save(canvas, path)


def step_picture(rows: Iterable[Row], path: Path) -> None:
    """Where the time of a step goes, one stacked bar per variant; rows are those of the op "step part" of one shape."""
    rows = list(rows)
    variants = list(dict.fromkeys(row.variant for row in rows))
    of = {(row.variant, row.pass_name): row.p50 or 0.0 for row in rows}
    canvas, grid = plt.subplots(1, 1, figsize=(10, 1.2 + 0.45 * len(variants)), layout="constrained", squeeze=False)
    (ax,), left = grid[0], np.zeros(len(variants))
    for i, part in enumerate(dict.fromkeys(row.pass_name for row in rows)):
        times = np.array([of.get((variant, part), 0.0) for variant in variants])
        ax.barh(variants, times, left=left, label=part, color=COLOURS[i % len(COLOURS)], height=0.72)
        left += times
    for variant, total in zip(variants, left, strict=True):
        ax.text(total, variant, f" {total:,.1f} ms", va="center", fontsize=8)
    ax.margins(x=0.12)
    ax.invert_yaxis()  # the first on top
    ax.set_xlabel("milliseconds")
    ax.set_title(f"A training step of {rows[0].shape}, {rows[0].dtype}, {rows[0].gpu}", fontsize=11)
    _save(canvas, path)


def _save(canvas: plt.Figure, path: Path) -> None:
    """Put the legend of the first axes below everything, write the figure and close it."""
    for ax in canvas.axes:
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        canvas.savefig(file, format="png", dpi=120, metadata={"Software": None})
    plt.close(canvas)
