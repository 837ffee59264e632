"""Pictures of what was measured, counted and predicted, as PNG."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench.results import OURS, Row
from common import atomic_write

COLOURS = ("#1f6feb", "#d97706", "#15803d", "#b91c1c", "#7c3aed", "#0e7490", "#a16207", "#be185d", "#4b5563", "#94a3b8")
OUR_COLOUR = COLOURS[0]


def save(canvas: plt.Figure, path: Path) -> None:
    """Write a figure and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        canvas.savefig(file, format="png", dpi=120, metadata={"Software": None})
    plt.close(canvas)


def figure(width: float, height: float, n_columns: int = 1, **options) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    """Axes side by side, in inches."""
    canvas, axes = plt.subplots(1, n_columns, figsize=(width, height), layout="constrained", squeeze=False, **options)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return canvas, axes[0]


def legend(canvas: plt.Figure, ax: plt.Axes) -> None:
    """What the colours of some axes mean, below everything."""
    handles, labels = ax.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8, frameon=False)


def top_first(ax: plt.Axes) -> None:
    """Put the first of the names on top; once where axes share them."""
    ax.invert_yaxis()


def grouped_bars(
    ax: plt.Axes,
    names: Sequence[str],
    groups: dict[str, Sequence[float | None]],
    form: str = "{:,.0f}",
    first_colour: int = 0,
) -> None:
    """Horizontal bars, one row a name and one bar a group in it, each with its number."""
    height = 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * height
        bars = ax.barh(places, [v or 0 for v in values], 0.92 * height, label=group, color=COLOURS[first_colour + i])
        ax.bar_label(bars, [form.format(v) if v is not None else "" for v in values], padding=2, fontsize=7)
    ax.set_yticks(np.arange(len(names)), names, fontsize=8)
    ax.margins(x=0.12)


def stacked_bars(ax: plt.Axes, names: Sequence[str], parts: dict[str, Sequence[float]], form: str = "{:,.0f}") -> None:
    """Horizontal bars, one a name, of parts side by side; the total at the end."""
    left = np.zeros(len(names))
    for i, (part, values) in enumerate(parts.items()):
        ax.barh(names, values, left=left, label=part, color=COLOURS[i % len(COLOURS)], height=0.72)
        left += np.array(values)
    for name, total in zip(names, left, strict=True):
        ax.text(total, name, f" {form.format(total)}", va="center", fontsize=8)
    ax.margins(x=0.12)
    ax.tick_params(axis="y", labelsize=8)


def op_picture(rows: Iterable[Row], path: Path, size_of) -> None:
    """Time and percentage of the ceiling over size, one line a variant and one row of axes a pass.

    Args:
        rows: of one op, dtype and GPU.
        path: of the PNG.
        size_of: a row's place on the axis, from its shape.
    """
    rows = [row for row in rows if row.p50 is not None]
    passes = [d for d in ("forward", "backward", "both") if any(row.pass_name == d for row in rows)]
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
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xscale("log", base=2)
            ax.grid(alpha=0.25)
    first = rows[0]
    canvas.suptitle(f"{first.op}, {first.dtype}, {first.gpu}", fontsize=11)
    legend(canvas, grid[0][0])
    save(canvas, path)


def step_picture(rows: Iterable[Row], path: Path) -> None:
    """Where the time of a step goes, one stacked bar a variant; rows are those of the op "step part" of one shape."""
    rows = list(rows)
    variants = list(dict.fromkeys(row.variant for row in rows))
    parts = list(dict.fromkeys(row.pass_name for row in rows))
    of = {(row.variant, row.pass_name): row.p50 or 0.0 for row in rows}
    canvas, (ax,) = figure(10, 1.2 + 0.45 * len(variants))
    stacked_bars(ax, variants, {part: [of.get((v, part), 0.0) for v in variants] for part in parts}, "{:,.1f} ms")
    top_first(ax)
    ax.set_xlabel("milliseconds")
    ax.set_title(f"A training step of {rows[0].shape}, {rows[0].dtype}, {rows[0].gpu}", fontsize=11)
    legend(canvas, ax)
    save(canvas, path)
