"""Rows of measurements: CSV files in bench/results/<gpu>/, and what moved between two of them."""

import csv
import dataclasses
import functools
import io
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables import table
from common import BadInput, atomic_write

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
OURS = "triton"


@dataclass(frozen=True)
class Row:
    """One variant at one shape. Times in milliseconds."""

    op: str
    pass_name: str
    """forward, backward or both; of the op "step part", a name in variants.PARTS"""
    variant: str
    """who was timed: ours, a baseline, or the ceiling"""
    shape: str
    dtype: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    bytes: int = 0
    """compulsory bytes of the op's own formula"""
    flops: int = 0
    percent: float | None = None
    """of the ceiling: a copy of the same bytes, or matrix products, timed in the same run"""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    """with a + where the tree had changes that were not committed"""
    note: str = ""
    """why there is no time (wrong, out of memory, refused), or what to know of it (peak memory, a late host)"""

    def with_(self, **changes: Any) -> "Row":
        """The same with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def times(self) -> tuple[float, float, float] | None:
        """p20, p50 and p80, where there are all of them."""
        return None if self.p20 is None or self.p50 is None or self.p80 is None else (self.p20, self.p50, self.p80)

    @property
    def key(self) -> tuple[str, ...]:
        """What a second measurement of the same thing has too."""
        return self.op, self.pass_name, self.variant, self.shape, self.dtype


def folder(gpu: str, results: Path = RESULTS) -> Path:
    """Where the rows of a GPU live: "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3."""
    return results / "-".join(gpu.lower().split())


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a CSV file; those that it has of the same key and GPU are replaced."""
    kept = {(row.key, row.gpu): row for row in [*(read(path) if path.exists() else []), *rows]}
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in kept.values():
        writer.writerow({k: "" if v is None else v for k, v in dataclasses.asdict(row).items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, or of all CSV files in a folder.

    Raises:
        BadInput: there is none, or it is none of ours.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise BadInput(f"no rows in {path}; name a CSV file, or a folder of them such as one of bench/results")
    rows = []
    for file in files:
        with open(file, newline="") as lines:
            reader = csv.DictReader(lines)
            if reader.fieldnames != [field.name for field in dataclasses.fields(Row)]:
                raise BadInput(f"{file} has other columns than bench writes; name a file that bench wrote")
            rows += [_row(cells) for cells in reader]
    return rows


def _row(cells: dict[str, Any]) -> Row:
    numbers = {name: float(cells[name]) if cells[name] else None for name in ("p20", "p50", "p80", "percent")}
    return Row(**cells | numbers | {name: int(cells[name]) for name in ("bytes", "flops")})


def measured(results: Path = RESULTS) -> list[Row]:
    """All rows that a GPU gave."""
    return [row for path in sorted(results.glob("*/*.csv")) for row in read(path)]


def moved(before: Iterable[Row], after: Iterable[Row]) -> list[tuple[Row, Row, float]]:
    """(before, after, ratio of the medians) of rows whose intervals from p20 to p80 do not meet. Parts of a step were
    measured once and have none."""
    of, found = {row.key: row for row in before}, []
    for b in after:
        a = of.get(b.key)
        if a and a.times and b.times and (b.times[0] > a.times[2] or b.times[2] < a.times[0]):
            found.append((a, b, b.times[1] / a.times[1]))
    return found


def compare(before: Path, after: Path) -> int:
    """Print what moved; return 1 where something got slower, 0 otherwise."""
    old, new = read(before), read(after)
    found = sorted(moved(old, new), key=lambda pair: -pair[2])
    rows = [(*b.key, a.p50, b.p50, f"{100 * (ratio - 1):+.1f}%") for a, b, ratio in found]
    if rows:
        print(table(["op", "pass", "variant", "shape", "dtype", "ms before", "ms after", "change"], rows))
    both = {row.key for row in old} & {row.key for row in new}
    slower = sum(ratio > 1 for *_, ratio in found)
    print(f"{len(both)} rows in both; {slower} slower and {len(found) - slower} faster beyond their spread")
    return 1 if slower else 0


def is_stale(row: Row, root: Path = ROOT) -> bool:
    """True where a kernel of ours was changed after the row was measured."""
    if row.variant.partition(" ")[0] != OURS:
        return False
    return row.commit.endswith("+") or not _is_ancestor(_last_commit(row.op, root), row.commit, root)


SOURCES = {"add_layer_norm": "layer_norm", "linear_cross_entropy": "cross_entropy", "decode_attention": "decode"}
"""the kernel file of an op that has not its own"""


@functools.cache
def _last_commit(op: str, root: Path) -> str:
    files = ["kernels"] if op == "step" else [f"kernels/{SOURCES.get(op, op)}.py", "kernels/launch.py"]
    return git("log", "-1", "--format=%h", "--", *files, root=root)


@functools.cache
def _is_ancestor(ancestor: str, commit: str, root: Path) -> bool:
    done = subprocess.run(["git", "merge-base", "--is-ancestor", ancestor, commit], cwd=root, capture_output=True)
    return done.returncode == 0


def git(*args: str, root: Path = ROOT) -> str:
    """What git says, or an empty string where there is no git or no repository."""
    try:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit(root: Path = ROOT) -> str:
    """The commit of the tree, with a + where kernels or benchmarks differ from it."""
    status = git("status", "--porcelain", "--", "kernels", "bench", "model", "training", root=root)
    changed = [line for line in status.splitlines() if "bench/results/" not in line]
    return git("rev-parse", "--short", "HEAD", root=root) + ("+" if changed else "")
