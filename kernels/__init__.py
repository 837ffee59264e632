"""The operations of the model, as a table of functions: `kernels.ops`.

Hugging Face publishes a package that is called `kernels` too, and transformers imports it where it is installed. This
folder comes first on the path of whoever works in this repository, so it lends that package its place: modules and
names that are not ours are looked up there.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).parent

try:
    _hugging_face = importlib.metadata.distribution("kernels").locate_file("kernels")
    __path__.append(str(_hugging_face))
except importlib.metadata.PackageNotFoundError:
    _hugging_face = None


def _load_hugging_face() -> ModuleType:
    """Run the `__init__.py` of Hugging Face's package, once, under a name of its own."""
    name = "kernels._hugging_face_init"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, str(_hugging_face / "__init__.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def __getattr__(name: str) -> Any:
    # `from kernels import eager` asks here before it imports the submodule: what is ours must not load what is theirs.
    if _hugging_face is None or name.startswith("_") or (_HERE / f"{name}.py").exists():
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(_load_hugging_face(), name)
