"""What launches depend on: torch's settings of precision, dry runs, trials, and what is compiled already."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from kernels import cross_entropy, gelu, launch
from tests.conftest import DEVICE

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


@pytest.mark.parametrize(("op", "itemsize", "width"), [("attention", 2, 129), ("attention", 16, 64), ("no_op", 2, 64)])
def test_a_row_that_is_missing_is_named(op, itemsize, width):
    """Wider than any row, of larger elements, and of an op without rows."""
    told = f"{op} for compute capability 90, width {width} and itemsize {itemsize}; add a row to CONFIGS"
    with launch.DryRun(90, lambda call: None), pytest.raises(ValueError, match=told):
        launch.lookup(op, torch.device("cpu"), itemsize, width)


def test_a_dry_run_lists_launches_and_writes_nothing():
    x = torch.ones(1000, device=DEVICE)
    calls: list[launch.Call] = []
    with launch.DryRun(90, calls.append):
        gelu.gelu(x)
        assert launch.capability(x.device) == 90
    (call,) = calls
    assert call.kernel is gelu._gelu_fwd_kernel and call.grid == (1,)
    assert call.args["x_ptr"] is x and (call.args["n_elements"], call.args["BLOCK_N"]) == (1000, 1024)
    assert call.options == {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    assert launch.capability(torch.device("cpu")) == 0
    assert gelu.gelu(x)[0].item() == pytest.approx(0.8412, abs=1e-4)
    assert len(calls) == 1


def test_a_dry_run_looks_at_no_target():
    calls: list[launch.Call] = []
    with launch.DryRun(0, calls.append):
        cross_entropy.cross_entropy(torch.ones(2, 5, device=DEVICE), torch.tensor([7, 1], device=DEVICE))
    assert [call.kernel.fn.__name__ for call in calls] == ["_cross_entropy_fwd_kernel", "_mean_kernel"]


def test_a_trial_is_for_its_op_and_its_block():
    x = torch.randn(3000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    before = launch.lookup("gelu", x.device, 4)
    trial = launch.Trial(before._replace(block_n=256, num_warps=2))
    calls: list[launch.Call] = []
    with trial, launch.DryRun(90, calls.append):
        gelu.gelu(x)
        assert launch.lookup("embedding", x.device, 4).op == "embedding"
    assert calls[0].grid == (12,) and calls[0].options["num_warps"] == 2
    assert launch.lookup("gelu", x.device, 4) is before
    with trial:
        ours = gelu.gelu(x)
    assert torch.equal(ours, gelu.gelu(x))


def test_a_compiled_kernel_is_launched_again_for_calls_of_its_kind(monkeypatch):
    """A stand-in for Triton's JIT, which would compile for other dtypes, alignments, missing tensors and numbers."""
    compiled, launched = [], []

    class Jit:
        arg_names = ("x_ptr", "y_ptr", "n", "BLOCK_N")

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, **constants):
            compiled.append(args)
            return SimpleNamespace(function=0, packed_metadata=0, run=lambda *args: launched.append(args[-4:]))

    jit = Jit()

    def run(x, y, n, also) -> tuple:
        assert launch.run(jit, (x, y), (n,), lambda: ((1,), {"BLOCK_N": 32}), also)
        return x.data_ptr(), y if y is None else y.data_ptr(), n, 32

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    monkeypatch.setattr(launch, "_compiled", {})
    x, y, other = (torch.zeros(64) for _ in range(3))
    kinds = [
        (x, y, 64, "a"),
        (x, y, 63, "a"),
        (x, y, 64, "b"),
        (x, None, 64, "a"),
        (x.half(), y, 64, "a"),
        (x, y.half(), 64, "a"),
        (x[1:], y, 64, "a"),
        (x, y[1:], 64, "a"),
        (x[2:], y, 64, "a"),
    ]
    for kind in kinds:
        run(*kind)
    assert len(compiled) == len(kinds) and not launched
    assert [run(*kind) for kind in kinds] == launched
    assert run(other, y, 64, "a") == launched[-1]
    assert len(compiled) == len(kinds)
