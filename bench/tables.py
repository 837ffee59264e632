"""Tables on the screen and in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from common import BadInput, atomic_write

BEGIN, END = "<!-- written by python -m bench: begin -->", "<!-- written by python -m bench: end -->"


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
    lines = [
        [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        for row in cells
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def put_table(text: str, path: Path) -> None:
    """Put a table into a document, between its two markers.

    Raises:
        BadInput: the document has no markers.
    """
    old = path.read_text()
    if BEGIN not in old or END not in old:
        raise BadInput(f"{path} has no lines {BEGIN} and {END}; put them where the table is to be")
    before, after = old.partition(BEGIN)[0], old.partition(END)[2]
    with atomic_write(path) as file:
        file.write(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def _cell(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
