"""Hugging Face's package `kernels`, which transformers imports where it is installed, beside ours of that name.

A stand-in for it is installed into a folder: what transformers takes from it at import, its modules importing each
other by absolute names as theirs do, and the metadata by which it is found. Each case runs in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

from tests.conftest import ROOT

INIT = """
import importlib.metadata
__version__ = importlib.metadata.version("kernels")
from kernels.layer import *
from kernels.load import get_kernel
"""
LAYER = """
import enum
from kernels.layer.mode import Mode

class Device:
    def __init__(self, *args, **kwargs): pass
class CUDAProperties(Device): pass
class ROCMProperties(Device): pass
class KernelizeFallback(Device): pass
class FuncRepository(Device): pass
class LayerRepository(Device): pass
class LocalLayerRepository(Device): pass

def decorator(*args, **kwargs): return lambda cls: cls
use_kernel_forward_from_hub = use_kernel_func_from_hub = use_kernelized_func = decorator
def kernelize(model, **kwargs): return model
def register_kernel_mapping(*args, **kwargs): pass
def replace_kernel_forward_from_hub(*args, **kwargs): pass
def use_kernel_mapping(*args, **kwargs): pass
"""
MODE = """
import enum
class Mode(enum.Flag):
    INFERENCE = enum.auto()
    TRAINING = enum.auto()
    TORCH_COMPILE = enum.auto()
"""
LOAD = """
def get_kernel(*args, **kwargs): raise RuntimeError("not here")
"""

LOADS_A_MODEL = """
from transformers.utils import is_kernels_available
assert is_kernels_available(), "transformers does not take the stand-in"
import transformers.integrations.hub_kernels
from transformers import GPT2Config, GPT2LMHeadModel
GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8))
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """The folder in which the stand-in is installed."""
    site = tmp_path / "site"
    files = {"__init__.py": INIT, "layer/__init__.py": LAYER, "layer/mode.py": MODE, "load.py": LOAD}
    for name, content in files.items():
        path = site / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    version = getattr(
        import_utils, "KERNELS_MIN_VERSION", "0.18.2"
    )  # transformers refuses versions that it doesn't know
    metadata = site / f"kernels-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    metadata.with_name("top_level.txt").write_text("kernels\n")  # by which older transformers find the version
    return site


def python(code: str, root: Path, site: Path | None = None) -> subprocess.CompletedProcess:
    """Run code with `root` first on the path, then `site`, then what is installed here."""
    path = ":".join(str(folder) for folder in (root, site) if folder)
    environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )


def test_both_packages_work_side_by_side(installed):
    checks = f"""
import sys
from kernels.ops import EAGER
assert "kernels.layer" not in sys.modules, "ours alone must not load theirs"
{LOADS_A_MODEL}
import kernels, kernels.eager, kernels.ops
from kernels import Mode, get_kernel
from kernels.layer.mode import Mode as same_mode
assert EAGER.gelu is kernels.eager.gelu
assert kernels.__file__ == {str(ROOT / "kernels" / "__init__.py")!r}
assert kernels.ops.__file__ == {str(ROOT / "kernels" / "ops.py")!r}
assert sys.modules["kernels.layer"].__file__.startswith({str(installed)!r})
assert Mode is same_mode and get_kernel.__module__ == "kernels.load"
assert not hasattr(kernels, "no_such_name")

import torch
from model import hf
from model.gpt import GPT, GPTConfig
gpt = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8))
ids = torch.arange(8)[None]
torch.testing.assert_close(hf.to_hf(gpt)(ids).logits, gpt(ids, ids)[0])
"""
    done = python(checks, ROOT, installed)
    assert done.returncode == 0, done.stderr


def test_ours_works_where_theirs_is_broken(installed):
    (installed / "kernels" / "__init__.py").write_text("raise ImportError('broken')")
    done = python("from kernels import eager; from kernels.ops import EAGER", ROOT, installed)
    assert done.returncode == 0, done.stderr


def test_names_of_nobody(monkeypatch):
    import kernels

    monkeypatch.setattr(kernels, "_hugging_face", None)
    with pytest.raises(AttributeError, match="'kernels' has no attribute 'Mode'"):
        kernels.Mode  # noqa: B018
