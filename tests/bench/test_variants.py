"""The timed training step, on the CPU with a clock that counts."""

import functools
import json
import weakref

import pytest
import torch

from bench import harness, variants
from model.gpt import GPTConfig
from tests.conftest import needs_interpreter

COMPILE = torch.compile
TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=1, n_head=2, n_embd=32)


@pytest.fixture
def steps(device, monkeypatch):
    """Measure variants of a tiny network, each step of which takes 7 ms."""
    monkeypatch.setitem(variants.PRESETS, "tiny", TINY)
    monkeypatch.setattr(harness, "ROUNDS", (1, 1))
    monkeypatch.setattr(harness, "WARM_UP", 1)
    original = variants.training_step

    def timed(*args):
        device.pass_time(7.0)
        return original(*args)

    monkeypatch.setattr(variants, "training_step", timed)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)

    def measure(*names, **options):
        return variants.measure("tiny", (2, 8), torch.float32, device, names, seconds=0.05, **options)

    return measure


@needs_interpreter  # test_gpu.py times them on a GPU
def test_every_variant_makes_steps(steps, device, monkeypatch):
    device.gpu = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(variants, "PASSES", 1)
    rows = {row.variant: row for row in steps(*variants.VARIANTS) if row.op == "step"}
    assert list(rows) == list(variants.VARIANTS)
    for row in rows.values():
        assert row.p50 == pytest.approx(7.0, rel=1e-4), row.note
        assert (row.shape, row.dtype, row.note) == ("tiny 2×8", "float32", "peak 25.0 GB")
        assert row.flops == variants.flops_per_token(TINY, 8) * 16
        assert row.percent == pytest.approx(100 * row.flops / 7e-3 / 66.9e12, rel=1e-3)  # MFU


def test_one_network_is_alive_at_a_time(steps, monkeypatch):
    """That of a variant that fails too, which does not stop the others and is not built again; and the compiler holds
    none."""
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="eager"))
    alive, most_alive = weakref.WeakSet(), []
    network, training_step = variants.GPT, variants.training_step

    def counted(*args):
        gpt = network(*args)
        alive.add(gpt)
        most_alive.append(len(alive))
        return gpt

    def out_of_memory(model, *args):
        if getattr(model, "_orig_mod", model).ops is variants.SDPA:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training_step(model, *args)

    monkeypatch.setattr(variants, "GPT", counted)
    monkeypatch.setattr(variants, "training_step", out_of_memory)
    rows = {row.variant: row for row in steps("eager", "sdpa", "eager + compile") if row.op == "step"}
    assert most_alive == [1] * (2 * variants.PASSES + 1) and not alive
    assert (rows["sdpa"].p50, rows["sdpa"].note) == (None, "out of memory")
    assert [rows[name].p50 for name in ("eager", "eager + compile")] == pytest.approx([7.0, 7.0], rel=1e-4)


def test_a_drift_of_the_clock_meets_every_variant(steps, device, monkeypatch):
    original = variants.build
    built = []

    def slower(*args):
        built.append(args)
        make_step = original(*args)
        return lambda: device.pass_time(7.0 if len(built) > 2 else 0.0) or make_step()

    monkeypatch.setattr(variants, "build", slower)
    rows = [row for row in steps("eager", "sdpa") if row.op == "step"]
    assert [(row.p20, row.p50, row.p80) for row in rows] == [pytest.approx((8.4, 10.5, 12.6), rel=1e-4)] * 2


def test_a_variant_that_fails_in_the_second_pass_has_no_time(steps, monkeypatch):
    builds = iter([variants.build])
    monkeypatch.setattr(variants, "build", lambda *args: next(builds)(*args))
    (row,) = steps("eager")
    assert (row.p50, row.note) == (None, "failed: StopIteration: ")


def test_what_no_kernel_accounts_for_is_idle(steps, tmp_path):
    rows = steps("eager", chrome_trace=tmp_path / "trace.json")
    parts = {row.pass_name: row.p50 for row in rows if row.op == "step part"}
    assert list(parts) == [*variants.PARTS, "idle"]
    assert parts["idle"] == pytest.approx(7.0, rel=1e-4)  # a CPU has no GPU kernels
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", "matmul"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "matmul"),
        ("_attention_fwd_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, cutlass::bfloat16_t>>", "attention"),
        ("aten::_softmax", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>", "attention"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, SoftMaxForwardEpilogue>", "attention"),
        ("_layer_norm_bwd_kernel", "norm"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>", "norm"),
        ("void at::native::GammaBetaBackwardCUDAKernelTemplate<float>", "norm"),
        ("_gelu_fwd_kernel", "GELU"),
        ("_linear_cross_entropy_kernel", "loss"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, LogSoftMaxForwardEpilogue>", "loss"),
        ("aten::_log_softmax", "loss"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::embedding_dense_backward", "embedding"),
        ("aten::sum", "column sums"),
        ("_column_sums_kernel", "column sums"),
        ("aten::_to_copy", "copies and casts"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies and casts"),
        ("void at::native::reduce_kernel<128, 4>", "other"),
    ],
)
def test_names_belong_to_parts(name, part):
    assert variants.part_of(name) == part
