"""Tables on the screen and in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import BadInput, atomic_write


def table(header: Sequence[str], rows: Iterable[Sequence], markdown: bool = False) -> str:
    """Rows of cells as text: numbers to the right, everything else to the left.

    Args:
        header: a name for each column.
        rows: of the same length; floats get three significant digits, integers thousands separators.
        markdown: with bars, for a document.
    """
    rows = list(rows)
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]
    lines = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)] for row in cells]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def put_table(text: str, path: Path, command: str) -> None:
    """Put a table into a document, between the two markers of the command that writes it.

    Raises:
        BadInput: the document has no such markers.
    """
    begin, end = (f"<!-- written by {command}: {what} -->" for what in ("begin", "end"))
    old = path.read_text()
    if begin not in old or end not in old:
        raise BadInput(f"{path} has no lines {begin} and {end}; put them where the table is to be")
    before, after = old.partition(begin)[0], old.partition(end)[2]
    with atomic_write(path) as file:
        file.write(f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
