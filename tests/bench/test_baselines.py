"""The adapters of baselines: those of libraries on stand-ins with their signatures.

test_ops.py checks and times torch's own, test_variants.py compiles whole networks.
"""

import contextlib
import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import baselines
from kernels import accuracy, eager


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYER_NORM = {"x": normal(6, 16), "weight": normal(16, seed=1), "bias": normal(16, seed=2)}
LOGITS = {"logits": normal(6, 11), "targets": torch.tensor([0, 10, -1, 3, 3, 5])}
HEAD = {"hidden": normal(6, 8), "weight": normal(11, 8, seed=1), "targets": LOGITS["targets"]}
QKV = {"qkv": normal(2, 9, 3 * 16), "n_head": 2}


def test_each_sdpa_backend_is_forced(monkeypatch):
    entered = []
    monkeypatch.setattr(baselines, "sdpa_kernel", lambda of: entered.append(of) or contextlib.nullcontext())
    for attention in baselines.sdpa().values():
        attention(**QKV)
    assert entered == list(baselines.SDPA.values()) and len(set(entered)) == 4


def test_three_matmuls_are_those_of_the_head():
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (HEAD["hidden"], HEAD["weight"]))
    out = baselines.three_matmuls(hidden, weight, HEAD["targets"])
    logits = hidden.detach() @ weight.detach().t()
    assert out.shape == () and out == logits[0, 0]
    out.backward()
    torch.testing.assert_close(hidden.grad, logits @ weight.detach())
    torch.testing.assert_close(weight.grad, logits.t() @ hidden.detach())


class LigerLayerNormFunction:
    @staticmethod
    def apply(X, W, B, eps):
        return F.layer_norm(X, W.shape, W, B, eps)


def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100):
    loss = F.cross_entropy(input.clone(), target, ignore_index=ignore_index)
    input.data.zero_()  # as Liger writes the gradient over the logits
    return loss


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert weight.dtype == bias.dtype == torch.float32 and return_rstd and return_mean
    mean, rstd = x.mean(-1), (x.var(-1, unbiased=False) + eps).rsqrt()
    return F.layer_norm(x, weight.shape, weight, bias, eps), rstd, mean


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    x_hat = (x - mean[:, None]) * rstd[:, None]
    wdy = dout * weight
    dx = (wdy - wdy.mean(-1, keepdim=True) - x_hat * (wdy * x_hat).mean(-1, keepdim=True)) * rstd[:, None]
    return dx, (dout * x_hat).sum(0), dout.sum(0)


def quack_cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100):
    return F.cross_entropy(x, target, ignore_index=ignore_index)


def linear_cross_entropy(hidden, weight, targets, /, *, ignore_index=-100):
    return F.cross_entropy(hidden @ weight.t(), targets, ignore_index=ignore_index)


asked_deterministic: set[bool] = set()


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
    assert causal and qkv.shape[2] == 3
    asked_deterministic.add(deterministic)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


LIBRARIES: dict[str, dict[str, Any]] = {
    "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LigerLayerNormFunction},
    "liger_kernel.transformers.functional": {
        "liger_cross_entropy": liger_cross_entropy,
        "liger_fused_linear_cross_entropy": linear_cross_entropy,
    },
    "quack.rmsnorm": {"layernorm_fwd": layernorm_fwd, "layernorm_bwd": layernorm_bwd},
    "quack.cross_entropy": {"cross_entropy": quack_cross_entropy},
    "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": linear_cross_entropy},
    "cut_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
    "flash_attn": {"flash_attn_qkvpacked_func": flash_attn_qkvpacked_func},
}


@pytest.mark.parametrize(
    ("adapters", "reference", "inputs"),
    [
        (baselines.LAYER_NORM, eager.layer_norm, LAYER_NORM),
        (baselines.ATTENTION, eager.attention, QKV),
        (baselines.CROSS_ENTROPY, eager.cross_entropy, LOGITS),
        (baselines.LINEAR_CROSS_ENTROPY, eager.linear_cross_entropy, HEAD),
    ],
)
def test_libraries_where_they_are_installed(adapters, reference, inputs, monkeypatch):
    for path, contents in LIBRARIES.items():
        parts = path.split(".")
        for dotted in (".".join(parts[: i + 1]) for i in range(len(parts))):
            module = types.ModuleType(dotted)
            module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(dotted, None)
            monkeypatch.setitem(sys.modules, dotted, module)
        for name, function in contents.items():
            monkeypatch.setattr(module, name, function, raising=False)
    made = baselines.installed(adapters)
    assert list(made) == list(adapters)
    out = reference(*inputs.values())
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    for name, baseline in made.items():
        asked_deterministic.clear()
        comparisons = accuracy.compare_op(baseline, reference, inputs, [torch.ones_like(out)])
        assert comparisons and all(c.ok for c in comparisons), comparisons
        assert asked_deterministic <= {"deterministic" in name}
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    monkeypatch.setattr(baselines, "MODULES", dict.fromkeys(baselines.MODULES, "not_installed"))
    assert baselines.installed(adapters) == {}
