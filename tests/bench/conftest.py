"""What the tests of benchmarks share: a device whose clock counts, and a benchmark of a toy op."""

import pytest
import torch

from bench.harness import Benchmark, Shape
from kernels import interpreter
from kernels.cost import Cost

interpreter.choose("cuda" if torch.cuda.is_available() else "cpu")


class FakeDevice:
    """A CPU that takes itself for a GPU. Time passes only where somebody lets it.

    What the host enqueues begins when it is enqueued, or when the device is done with what came before.
    """

    torch_device = torch.device("cpu")
    gpu = "NVIDIA Fake 1"
    driver = "1.0"
    l2_bytes = 4096

    def __init__(self):
        self.host = 0.0
        self.now = 0.0
        """when the device will be done with all that is enqueued"""
        self.holds: list[float] = []

    def pass_time(self, milliseconds: float, on_host: float = 0.0) -> None:
        self.host += on_host
        self.now = max(self.now, self.host) + milliseconds

    def hold(self, milliseconds: float) -> None:
        self.holds.append(milliseconds)
        self.pass_time(milliseconds)

    def host_milliseconds(self) -> float:
        return self.host

    def mark(self) -> float:
        self.pass_time(1e-7)  # no two events of a GPU are at the same moment
        return self.now

    def reached(self, mark: float) -> bool:
        return self.host >= mark

    def milliseconds(self, start: float, end: float) -> float:
        self.host = max(self.host, end)
        return end - start

    def peak_bytes(self) -> int:
        return 25 * 10**9

    def capture(self, call):
        return call


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


class Doubling(torch.autograd.Function):
    """y = 2·x, which takes so long on the fake device, forward and backward."""

    @staticmethod
    def forward(ctx, x, device, forward_ms, backward_ms, factor):
        device.pass_time(forward_ms)
        ctx.rest = device, backward_ms, factor
        return factor * x

    @staticmethod
    def backward(ctx, dy):
        device, backward_ms, factor = ctx.rest
        device.pass_time(backward_ms)
        return factor * dy, None, None, None, None


@pytest.fixture
def toy(device):
    """Makes a benchmark of y = 2·x from baselines given as (forward ms, backward ms, factor)."""

    def make(kernel=(1.0, 2.0, 2.0), **baselines) -> Benchmark:
        def timed(forward_ms, backward_ms, factor):
            return lambda x: Doubling.apply(x, device, forward_ms, backward_ms, factor)

        return Benchmark(
            op="toy",
            shapes=(Shape("8×16", {"n_rows": 8, "n_cols": 16}, {"n_rows": 2, "n_cols": 16}),),
            inputs=lambda n_rows, n_cols, dtype, device: {"x": torch.ones(n_rows, n_cols, dtype=dtype)},
            reference=lambda x: 2 * x,
            kernel=timed(*kernel),
            baselines=lambda: {
                name: variant if callable(variant) else timed(*variant) for name, variant in baselines.items()
            },
            costs=lambda n_rows, n_cols, itemsize: (Cost(2 * n_rows * n_cols * itemsize, n_rows * n_cols),) * 2,
        )

    return make
