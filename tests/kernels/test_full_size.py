"""At full size on a GPU: what the interpreter is too slow for, and what it cannot show."""

import shutil
import subprocess
import sys

import pytest
import torch

from kernels import accuracy, attention, cross_entropy, eager
from model.gpt import GPT, PRESETS
from tests.conftest import ROOT, TRITON
from tests.kernels.conftest import assert_no_worse, normal
from training.check import check

pytestmark = pytest.mark.gpu


def tokens(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(50257, (B, T + 1), generator=torch.Generator().manual_seed(3)).cuda()
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_every_op_and_gradient_of_d12(dtype, capsys):
    B = 64 if dtype == torch.bfloat16 else 8
    torch.cuda.reset_peak_memory_stats()
    right = check(GPT(PRESETS["d12"], TRITON).cuda(), *tokens(B, 1024), dtype)
    assert right, "\n".join(line for line in capsys.readouterr().out.splitlines() if "OFF" in line)
    assert torch.cuda.max_memory_allocated() < 60e9


def test_a_step_of_d12_has_the_same_bits_each_time():
    def gradients() -> list[torch.Tensor]:
        gpt = GPT(PRESETS["d12"], TRITON).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = gpt(*tokens(16, 1024), return_logits=False)[1]
        loss.backward()
        return [loss.detach(), *(param.grad for param in gpt.parameters())]

    assert all(torch.equal(first, second) for first, second in zip(gradients(), gradients(), strict=True))


def test_logits_of_more_than_two_to_the_31_elements():
    """The last rows of a large call against a call of theirs alone. Their stride is the same, so it runs the same code,
    which adds a row up in the same order."""
    n_rows, last = 43008, 256
    padded = torch.empty(n_rows, 50304, dtype=torch.bfloat16, device="cuda").normal_()
    assert padded.numel() > 2**31
    logits = padded[:, :50257].requires_grad_()
    targets = torch.randint(50257, (n_rows,), generator=torch.Generator().manual_seed(4)).cuda()
    targets[:-last] = -1
    loss = cross_entropy.cross_entropy(logits, targets)
    loss.backward()
    rows = padded[-last:].clone()[:, :50257].requires_grad_()
    alone = cross_entropy.cross_entropy(rows, targets[-last:])
    alone.backward()
    torch.testing.assert_close(loss, alone)
    assert torch.equal(logits.grad[-last:], rows.grad) and not logits.grad[:-last].any()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_sequences(head_dim):
    inputs = {"qkv": normal(1, 4096, 3 * 2 * head_dim, dtype=torch.bfloat16), "n_head": 2}
    dy = normal(1, 4096, 2 * head_dim, dtype=torch.bfloat16, seed=1)
    assert_no_worse(accuracy.compare_op(attention.causal_attention, eager.attention, inputs, [dy]))


@pytest.mark.parametrize("precision", ["highest", "high"], ids=["ieee", "tf32"])
def test_fp32_products_follow_torch(precision):
    torch.set_float32_matmul_precision(precision)  # tests/conftest.py puts it back
    inputs = {"qkv": normal(2, 512, 3 * 128), "n_head": 2}
    comparisons = accuracy.compare_op(
        attention.causal_attention, eager.attention, inputs, [normal(2, 512, 128, seed=1)]
    )
    assert_no_worse(comparisons)
    assert (max(c.error for c in comparisons) > 1e-4) == (precision == "high")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """Odd shapes, forward and backward, through every op."""
    code = """
import torch
from kernels.ops import triton_ops
from model.gpt import GPT, GPTConfig
gpt = GPT(GPTConfig(block_size=100, vocab_size=131, n_layer=1, n_head=3, n_embd=60), triton_ops("cuda")).cuda()
ids = torch.randint(131, (3, 98), generator=torch.Generator().manual_seed(0)).cuda()
for return_logits in (True, False):
    with torch.autocast("cuda", torch.bfloat16):
        loss = gpt(ids[:, :-1], ids[:, 1:], return_logits=return_logits)[1]
    loss.backward()
torch.cuda.synchronize()
"""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
