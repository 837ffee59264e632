"""Imports go in one direction and never in a circle. Those inside functions count too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

WITHOUT_TRITON = ("kernels.ops", "kernels.sublayer", "kernels.eager", "kernels.dispatch")
ALLOWED = {  # what the files of a folder may import of ours; of kernels the model needs only what does without triton
    "common": (),
    "readers": ("common",),
    "kernels": ("kernels",),
    "data": ("data", "common", "readers"),
    "model": ("model", *WITHOUT_TRITON, "data.tokenizer", "common", "readers"),
    # Of training, evals need only how ranks start and agree.
    "evals": ("evals", "training.distributed", "model", "data", "kernels.ops", "common", "readers"),
    "training": ("training", "model", "data", "kernels.ops", "kernels.accuracy", "common", "readers"),
    "train": ("training", "evals", "model", "data", "kernels.ops", "common", "readers"),
    "bench": ("bench", "training", "model", "kernels", "common"),
    "docs": ("docs", "model", "kernels", "common"),
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (*ROOT.glob("*.py"), *(file for folder in ALLOWED for file in (ROOT / folder).rglob("*.py")))
}
OURS = {*ALLOWED, "tests"}


def imports(path: Path) -> set[str]:
    """Names of modules, ours and others'."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members & FILES.keys() or {str(node.module)}
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_one_direction(folder):
    allowed = tuple(f"{name}." for name in ALLOWED[folder])
    for file, path in FILES.items():
        if file.partition(".")[0] == folder:
            wrong = [n for n in imports(path) if n.partition(".")[0] in OURS and not f"{n}.".startswith(allowed)]
            assert wrong == [], file
            assert folder in ("kernels", "bench") or "triton" not in {n.partition(".")[0] for n in imports(path)}, file


def test_no_circle():
    TopologicalSorter({file: imports(path) for file, path in FILES.items()}).prepare()
