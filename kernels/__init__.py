"""The operations of the model, as a table of functions: `kernels.ops`.

Hugging Face publishes a package that is also called `kernels`, and transformers imports it where it is installed. In
this repository our folder comes first on Python's path. Names and modules that are not ours are therefore looked up in
Hugging Face's package.
"""

import contextlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).parent

_hugging_face: Path | None = None
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    _hugging_face = Path(str(importlib.metadata.distribution("kernels").locate_file("kernels")))
    __path__.append(str(_hugging_face))


def _load_hugging_face(folder: Path) -> ModuleType:
    """Run the `__init__.py` of Hugging Face's package, once, under a name of its own."""
    name = "kernels._hugging_face_init"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec and spec.loader  # as every file whose name ends in .py
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def __getattr__(name: str) -> Any:
    # `from kernels import eager` calls this before it imports our submodule, which must not load their package.
    if _hugging_face is None or name.startswith("_") or (_HERE / f"{name}.py").exists():
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(_load_hugging_face(_hugging_face), name)
