"""`python -m bench report`: the table in README and the pictures, from the rows that a GPU gave."""

import re
from collections.abc import Iterable
from pathlib import Path

from bench import pictures
from bench.results import OURS, RESULTS, ROOT, Row, folder, is_stale, measured
from bench.tables import put_table, table

COMMAND = "python -m bench report"
NOT_MEASURED = "Nothing has been measured on a GPU yet."
CEILINGS = ("copy", "matmul", "three matmuls")
HEADER = ("op", "pass", "shape", "GPU", "ms", "of the ceiling", "fastest baseline")


def lines_of(rows: Iterable[Row]) -> list[tuple]:
    """Per GPU, ours in bf16: every op at the first of its shapes, forward and backward, and every step."""
    rows = [row for row in rows if row.p50 is not None and row.dtype == "bfloat16"]
    first: dict[tuple[str, str], str] = {}
    lines = []
    for row in rows:
        is_step = row.op == "step"
        if row.variant != OURS or row.op == "step part" or (row.pass_name == "both" and not is_step):
            continue
        if not is_step and first.setdefault((row.gpu, row.op), row.shape) != row.shape:
            continue
        same = [r for r in rows if (r.gpu, r.op, r.pass_name, r.shape) == (row.gpu, row.op, row.pass_name, row.shape)]
        baselines = [r for r in same if r.variant not in CEILINGS and r.variant.partition(" ")[0] != OURS]
        best = min(baselines, key=lambda r: r.p50 or 0.0, default=None)
        lines.append(
            (
                *(row.op, row.pass_name, row.shape, row.gpu),
                f"{row.p50:.3g}{' (older than the kernel)' if is_stale(row) else ''}",
                f"{row.percent:.0f}%" if row.percent is not None else "",
                f"{best.variant}, {best.p50:.3g} ms" if best else "",
            )
        )
    return lines


def size_of(row: Row) -> int:
    """Place of a row on a picture's axis: T for attention, else the width that varies; of equal ones the first."""
    numbers = [int(number) for number in re.findall(r"\d+", row.shape)]
    return numbers[1] if len(numbers) > 1 else numbers[0]


def draw(results: Path) -> list[Path]:
    """Redraw the pictures of every GPU: one per op, dtype and family of shapes, one per step."""
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
    return f"head_dim {numbers[3]}" if "attention" in row.op else f"{numbers[0]} rows"


def main(readme: Path = ROOT / "README.md", results: Path = RESULTS) -> int:
    """Draw, and write the table."""
    lines, paths = lines_of(measured(results)), draw(results)
    put_table(table(HEADER, lines, markdown=True) if lines else NOT_MEASURED, readme, COMMAND)
    print(f"{readme}: {len(lines)} lines" if lines else f"{readme}: {NOT_MEASURED}", *paths, sep="\n")
    return 0
