"""What launches depend on: torch's settings of precision, and rows whose kernels keep to their registers."""

import itertools

import pytest
import torch

from kernels import launch

MATMUL = torch.backends.cuda.matmul


def setting(owner, name: str, value):
    return lambda: setattr(owner, name, value)


# Each of torch's setters, and what it sets: matmuls, or what they inherit where nothing was set for them.
SETTERS = {
    "highest": ("matmul", "ieee", lambda: torch.set_float32_matmul_precision("highest")),
    "high": ("matmul", "tf32", lambda: torch.set_float32_matmul_precision("high")),
    "medium": ("matmul", "tf32", lambda: torch.set_float32_matmul_precision("medium")),
    "allow_tf32": ("matmul", "tf32", setting(MATMUL, "allow_tf32", True)),
    "no allow_tf32": ("matmul", "ieee", setting(MATMUL, "allow_tf32", False)),
    "all bf16": ("all", "bf16", setting(torch.backends, "fp32_precision", "bf16")),
}
for value in ("none", "ieee", "tf32"):
    SETTERS[f"matmul {value}"] = ("matmul", value, setting(MATMUL, "fp32_precision", value))
    SETTERS[f"cuda {value}"] = ("cuda", value, setting(torch.backends.cudnn, "fp32_precision", value))
    SETTERS[f"all {value}"] = ("all", value, setting(torch.backends, "fp32_precision", value))


def forget_all_settings():
    for name in ("highest", "matmul none", "cuda none", "all none"):
        SETTERS[name][2]()


@pytest.fixture
def _settings_are_put_back():
    forget_all_settings()
    yield
    forget_all_settings()


@pytest.mark.usefixtures("_settings_are_put_back")
def test_fp32_dots_do_what_torchs_matmuls_do():
    """After any three of torch's setters, old and new: the most particular setting holds. torch's own older getters
    raise after some of them."""
    assert launch.fp32_dot_precision() == "ieee"
    for names in itertools.product(SETTERS, repeat=3):
        forget_all_settings()
        now = {"matmul": "none", "cuda": "none", "all": "none"}
        for name in names:
            level, value, set_it = SETTERS[name]
            now[level] = value
            set_it()
            wanted = next((value for value in now.values() if value != "none"), "none")
            assert launch.fp32_dot_precision() == ("tf32" if wanted == "tf32" else "ieee"), names
