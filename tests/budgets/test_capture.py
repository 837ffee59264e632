"""What is seen of a launch and of torch's operations, without a GPU and without memory."""

import torch
import torch.nn.functional as F

from kernels import launch
from kernels.gelu import gelu
from tests.budgets.capture import trace

BF16 = torch.bfloat16


def test_a_launch_is_noted_with_its_arguments_and_runs_nothing():
    with trace() as tracing:
        gelu(torch.empty(65536, 3072, dtype=BF16))
    (noted,) = tracing.launches
    row = launch.lookup("gelu", torch.device("cpu"), 2)
    assert noted.name == "_gelu_fwd_kernel"
    assert noted.grid == (65536 * 3072 // row.block_n,)
    assert noted.args["n_elements"] == 65536 * 3072
    assert noted.args["BLOCK_N"] == row.block_n
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
    assert noted.options == options | {"enable_fp_fusion": True}
    x = noted.args["x_ptr"]
    assert (x.shape, x.stride, x.dtype, x.offset) == ((65536, 3072), (3072, 1), BF16, 0)
    assert x.storage != noted.args["y_ptr"].storage
    assert noted.bytes == 2 * 65536 * 3072 * 2


def test_what_a_launcher_copies_is_seen():
    with trace() as tracing:
        x = torch.empty(64, 128, dtype=BF16).t()
        tracing.restart()
        gelu(x)
    assert [event.name for event in tracing.events] == ["aten::clone", "_gelu_fwd_kernel"]


def test_bytes_of_torch_operations():
    for i, (call, expected) in enumerate(
        [
            (lambda x, y: x + y, 3 * 24 * 4),
            (lambda x, y: x.add_(y), 3 * 24 * 4),
            (lambda x, y: x.copy_(y), 2 * 24 * 4),
            (lambda x, y: x.zero_(), 24 * 4),
            (lambda x, y: x + y[:1].expand(4, 6), (2 * 24 + 6) * 4),
            (lambda x, y: x.to(BF16), 24 * (4 + 2)),
            (lambda x, y: x @ y.t(), (24 + 24 + 16) * 4),
            (lambda x, y: torch.addmm(x, x[:, :4], y[:4], beta=0, out=x), (16 + 24 + 24) * 4),
            (lambda x, y: F.embedding(torch.empty(3, dtype=torch.int64), x), 2 * 18 * 4 + 3 * 8),
        ]
    ):
        with trace() as tracing:
            call(torch.empty(4, 6), torch.empty(4, 6))
        assert [event.bytes for event in tracing.events] == [expected], i


def test_flops_of_torch_operations():
    with trace() as tracing:
        x, y, bias = torch.empty(4, 6), torch.empty(5, 6), torch.empty(5)
        F.linear(x, y, bias)
        x @ y.t()
        torch.empty(3, 4, 6) @ torch.empty(3, 6, 5)
        q = torch.empty(2, 3, 8, 16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    flops = {event.name.partition("::")[2]: event.flops for event in tracing.events if event.flops}
    assert flops == {
        "addmm": 2 * 4 * 5 * 6,
        "mm": 2 * 4 * 5 * 6,
        "bmm": 3 * 2 * 4 * 5 * 6,
        "_scaled_dot_product_flash_attention_for_cpu": 2 * 2 * 2 * 3 * 8 * 8 * 16 // 2,
        "_scaled_dot_product_flash_attention_for_cpu_backward": 5 * 2 * 2 * 3 * 8 * 8 * 16 // 2,
    }


def test_autocast_casts_what_cuda_casts():
    with trace(), torch.autocast("cpu", BF16):
        x, w = torch.empty(4, 8), torch.empty(8, 8)
        half = F.linear(x, w)
        assert half.dtype == BF16
        assert F.layer_norm(half, (8,), torch.empty(8), torch.empty(8)).dtype == torch.float32
        assert F.softmax(half, -1).dtype == torch.float32
        assert half.softmax(-1).dtype == torch.float32
        assert torch.pow(half, 3.0).dtype == torch.float32
        assert F.cross_entropy(half, torch.zeros(4, dtype=torch.int64)).dtype == torch.float32
        assert F.gelu(half).dtype == BF16


def test_what_dies_is_not_alive():
    with trace() as tracing:
        x = torch.empty(1000)
        tracing.restart()
        assert tracing.live_bytes == 4000
        for _ in range(5):
            y = x + 1
        assert (tracing.live_bytes, tracing.peak_bytes) == (8000, 12000)
        z = y.view(10, 100)
        del y
        assert tracing.live_bytes == 8000
        del z
        assert tracing.live_bytes == 4000
    assert tracing.peak_bytes == 12000


def test_lists_of_tensors_take_as_many_launches_as_their_metadata_fits():
    with trace() as tracing:
        few = [torch.empty(100) for _ in range(110)]
        many = [*few, torch.empty(100)]
        long = [torch.empty(65536 * 321)]
        tracing.restart()
        for tensors in (few, many, long):
            torch._foreach_mul_(tensors, 2.0)
    assert [event.launches for event in tracing.events] == [1, 2, 2]
