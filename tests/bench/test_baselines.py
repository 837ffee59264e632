"""Every baseline's adapter: torch's on small shapes, the libraries' on stand-ins with their signatures."""

import contextlib
import importlib.machinery
import importlib.util
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


def assert_like(baseline, reference, inputs):
    with torch.no_grad():
        out = reference(*inputs.values())
    comparisons = accuracy.compare_op(baseline, reference, inputs, [torch.ones_like(out)])
    assert comparisons and all(c.ok for c in comparisons), comparisons


@pytest.fixture
def stand_in(monkeypatch):
    """Put a module into place as if it were installed."""

    def put(name: str, **functions):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            dotted = ".".join(parts[:i])
            module = types.ModuleType(dotted)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(dotted, None)
            monkeypatch.setitem(sys.modules, dotted, module)
        for attribute, function in functions.items():
            monkeypatch.setattr(module, attribute, function, raising=False)

    return put


LAYER_NORM = {"x": normal(6, 16), "weight": normal(16, seed=1), "bias": normal(16, seed=2)}
LOGITS = {"logits": normal(6, 11), "targets": torch.tensor([0, 10, -1, 3, 3, 5])}
HEAD = {"hidden": normal(6, 8), "weight": normal(11, 8, seed=1), "targets": LOGITS["targets"]}
QKV = {"qkv": normal(2, 9, 3 * 16), "n_head": 2}


def test_compiled_baselines_are_the_function(monkeypatch):
    options = []

    def compile(function, **given):
        options.append(given)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    made = baselines.of(eager.gelu)
    assert list(made) == ["eager", "compile", "compile max-autotune"]
    assert options == [{"dynamic": False}, {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}]
    assert set(made.values()) == {eager.gelu}


def test_compiled_baselines_trace_without_a_break():
    for function, inputs in (
        (eager.gelu, {"x": normal(5, 7)}),
        (
            eager.add_layer_norm,
            {"residual": normal(6, 16), "branch": normal(6, 16, seed=3), "w": normal(16), "b": normal(16)},
        ),
        (eager.sdpa_attention, QKV),
        (eager.linear_cross_entropy, HEAD),
        (eager.embedding, {"idx": torch.zeros(2, 3, dtype=torch.int64), "w": normal(5, 4), "p": normal(3, 4)}),
    ):
        compiled = torch.compile(function, dynamic=False, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs.values()), function(*inputs.values()))


def test_each_sdpa_backend_is_forced(monkeypatch):
    entered = []

    def record(backend):
        entered.append(backend)
        return contextlib.nullcontext()

    monkeypatch.setattr(baselines, "sdpa_kernel", record)
    for name, baseline in baselines.sdpa().items():
        entered.clear()
        assert_like(baseline, eager.attention, QKV)
        assert set(entered) == {baselines.SDPA[name]}
    assert len(set(baselines.SDPA.values())) == 4


def test_math_really_runs_under_its_name():
    assert_like(baselines.sdpa()["sdpa-math"], eager.attention, QKV)


def test_torch_gelu():
    assert_like(baselines.torch_gelu, eager.gelu, {"x": normal(5, 7)})


def test_three_matmuls_are_those_of_the_head():
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (HEAD["hidden"], HEAD["weight"]))
    out = baselines.three_matmuls(hidden, weight, HEAD["targets"])
    logits = hidden.detach() @ weight.detach().t()
    assert out.shape == () and out == logits[0, 0]
    out.backward()
    torch.testing.assert_close(hidden.grad, logits @ weight.detach())
    torch.testing.assert_close(weight.grad, logits.t() @ hidden.detach())


def test_only_installed_libraries_are_made(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {"liger_kernel": "a module"}.get)
    adapters: dict[str, Any] = {"liger": lambda: "made"} | dict.fromkeys(
        ("flash-attn deterministic", "quack", "cce"), lambda: 1 / 0
    )
    assert baselines.installed(adapters) == {"liger": "made"}


def test_liger_layer_norm(stand_in):
    class LigerLayerNormFunction:
        @staticmethod
        def apply(X, W, B, eps):
            return F.layer_norm(X, W.shape, W, B, eps)

    stand_in("liger_kernel.ops.layer_norm", LigerLayerNormFunction=LigerLayerNormFunction)
    assert_like(baselines.liger_layer_norm(), eager.layer_norm, LAYER_NORM)


def test_liger_cross_entropy_keeps_the_logits_of_the_caller(stand_in):
    def liger_cross_entropy(
        input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"
    ):
        loss = F.cross_entropy(input.clone(), target, ignore_index=ignore_index)
        input.data.zero_()
        return loss

    stand_in("liger_kernel.transformers.functional", liger_cross_entropy=liger_cross_entropy)
    logits = LOGITS["logits"].clone()
    assert_like(baselines.liger_cross_entropy(), eager.cross_entropy, LOGITS | {"logits": logits})
    assert torch.equal(logits, LOGITS["logits"])


def test_quack_layer_norm(stand_in):
    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        assert weight.dtype == bias.dtype == torch.float32 and return_rstd and return_mean
        mean, rstd = x.mean(-1), (x.var(-1, unbiased=False) + eps).rsqrt()
        return F.layer_norm(x, weight.shape, weight, bias, eps), rstd, mean

    def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
        x_hat = (x - mean[:, None]) * rstd[:, None]
        wdy = dout * weight
        dx = (wdy - wdy.mean(-1, keepdim=True) - x_hat * (wdy * x_hat).mean(-1, keepdim=True)) * rstd[:, None]
        return dx, (dout * x_hat).sum(0), dout.sum(0)

    stand_in("quack.rmsnorm", layernorm_fwd=layernorm_fwd, layernorm_bwd=layernorm_bwd)
    assert_like(baselines.quack_layer_norm(), eager.layer_norm, LAYER_NORM)


def test_quack_cross_entropy(stand_in):
    def cross_entropy(
        x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean", inplace_backward=False
    ):
        return F.cross_entropy(x, target, ignore_index=ignore_index)

    stand_in("quack.cross_entropy", cross_entropy=cross_entropy)
    assert_like(baselines.CROSS_ENTROPY["quack"](), eager.cross_entropy, LOGITS)


def test_heads(stand_in):
    def linear(hidden, weight, targets, ignore_index):
        return F.cross_entropy(hidden @ weight.t(), targets, ignore_index=ignore_index)

    def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return linear(input, weight, target, ignore_index)

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
        return linear(x, weight, target, ignore_index)

    def cce(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False):
        return linear(e, c, targets, ignore_index)

    stand_in("liger_kernel.transformers.functional", liger_fused_linear_cross_entropy=liger)
    stand_in("quack.linear_cross_entropy", chunked_linear_cross_entropy=quack)
    stand_in("cut_cross_entropy", linear_cross_entropy=cce)
    for make in baselines.LINEAR_CROSS_ENTROPY.values():
        assert_like(make(), eager.linear_cross_entropy, HEAD)


@pytest.mark.parametrize(("name", "deterministic"), [("flash-attn", False), ("flash-attn deterministic", True)])
def test_flash_attention(stand_in, name, deterministic):
    asked = []

    def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
        assert causal and qkv.shape[2] == 3
        asked.append(deterministic)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    stand_in("flash_attn", flash_attn_qkvpacked_func=flash_attn_qkvpacked_func)
    assert_like(baselines.ATTENTION[name](), eager.attention, QKV)
    assert set(asked) == {deterministic}
