"""`python -m bench report`: the pictures of what was measured, and the table in README, from the rows alone."""

import re
from collections.abc import Iterable
from pathlib import Path

from bench import pictures
from bench.results import OURS, PREDICTED, RESULTS, ROOT, Row, folder, is_stale, measured, read
from bench.tables import put_table, table

NOT_MEASURED = "not yet measured on a GPU"
CHIP = "H100"
"""whose predictions stand where nothing is measured"""
HEADER = (
    "op",
    "pass",
    "shape",
    "dtype",
    f"bound on an {CHIP}, ms (predicted)",
    "measured, ms",
    "of the ceiling",
    "fastest other",
)


def lines_of(predicted: Iterable[Row], rows: Iterable[Row]) -> list[tuple]:
    """One line a predicted row, beside what each GPU measured of it."""
    rows = [row for row in rows if row.p50 is not None]
    lines = []
    for bound in predicted:
        if bound.gpu != CHIP or bound.op == "step part" or (bound.op == "step" and bound.variant != OURS):
            continue
        cells = (bound.op, bound.pass_name, bound.shape, bound.dtype, f"{bound.p50:.3g}")
        same = [
            r
            for r in rows
            if (r.op, r.pass_name, r.shape, r.dtype) == (bound.op, bound.pass_name, bound.shape, bound.dtype)
        ]
        ours = [row for row in same if row.variant == OURS]
        if not ours:
            lines.append((*cells, NOT_MEASURED, "", ""))
        for row in ours:
            others = [r for r in same if r.gpu == row.gpu and r.variant not in (OURS, *CEILINGS)]
            best = min(others, key=lambda r: r.p50, default=None)
            mark = " (older than the kernel)" if is_stale(row) else ""
            lines.append(
                (
                    *cells,
                    f"{row.p50:.3g} on {row.gpu}{mark}",
                    f"{row.percent:.0f}%" if row.percent is not None else "",
                    f"{best.variant}, {best.p50:.3g} ms" if best else "",
                )
            )
    return lines


CEILINGS = ("copy", "matmul", "three matmuls")


def size_of(row: Row) -> int:
    """Place of a row on a picture's axis: T for attention, else the width that varies; of equal ones the first."""
    numbers = [int(number) for number in re.findall(r"\d+", row.shape)]
    return numbers[1] if len(numbers) > 1 else numbers[0]


def draw(results: Path) -> list[Path]:
    """Redraw the pictures of every GPU: one an op, dtype and family of shapes, one a step."""
    paths = []
    groups: dict[tuple, list[Row]] = {}
    for row in measured(results):
        family = row.shape if row.op == "step part" else _family(row)
        groups.setdefault((row.gpu, row.op, row.dtype, family), []).append(row)
    for (gpu, op, dtype, family), rows in groups.items():
        if op == "step" or not any(row.p50 is not None for row in rows):
            continue
        name = "-".join(re.sub(r"[^\w×]+", "-", part) for part in (op, dtype, family) if part).replace("×", "x")
        path = folder(gpu, results) / f"{name}.png"
        if op == "step part":
            pictures.step_picture(rows, path)
        else:
            pictures.op_picture(rows, path, size_of)
        paths.append(path)
    return paths


def _family(row: Row) -> str:
    """What shapes on one picture share: head_dim for attention, the number of rows for the others."""
    numbers = re.findall(r"\d+", row.shape)
    return f"head_dim {numbers[3]}" if row.op == "attention" else f"{numbers[0]} rows"


def main(readme: Path = ROOT / "README.md", results: Path = RESULTS) -> int:
    """Draw, and write the table."""
    rows = measured(results)
    predicted = read(results / PREDICTED.name / "roofline.csv")
    paths = draw(results)
    put_table(table(HEADER, lines_of(predicted, rows), markdown=True), readme)
    gpus = sorted({row.gpu for row in rows})
    print(f"{readme}: the table has {', '.join(gpus) if gpus else 'predictions alone: ' + NOT_MEASURED}")
    for path in paths:
        print(path)
    return 0
