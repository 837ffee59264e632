"""Compiled without a GPU, every kernel keeps to its registers and multiplies as the chip does best."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import kernels
from bench import machine_code
from bench.chips import CHIPS, occupancy
from bench.ops import VOCABULARY
from tests.budgets import resources, step
from tests.budgets.conftest import compile_for

ROW_KERNELS = {
    *(
        "_gelu_fwd_kernel",
        "_gelu_bwd_kernel",
        "_gelu_bwd_dbias_kernel",
        "_layer_norm_fwd_kernel",
        "_layer_norm_bwd_kernel",
    ),
    *("_embedding_fwd_kernel", "_linear_cross_entropy_kernel"),
}
"""that move rows whose width allows 128 bits"""


@pytest.fixture(scope="module")
def of_step(compiled):
    return [r for r in compiled if r.call == step.PRESET]


def all_kernels() -> set[str]:
    found = set()
    for module in pkgutil.iter_modules([str(Path(kernels.__file__).parent)]):
        for name, value in vars(importlib.import_module(f"kernels.{module.name}")).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                found.add(name)
    return found


OF_WIDE_ROWS = {"_wide_layer_norm_fwd_kernel", "_wide_layer_norm_bwd_kernel"}


def test_every_kernel(of_step, compiled):
    print(f"\n{resources.resources_table(of_step)}")
    assert {r.kernel for r in of_step} == all_kernels() - OF_WIDE_ROWS
    assert {r.kernel for r in compiled if r.call == "widest"} > OF_WIDE_ROWS


def test_no_spills_shared_memory_within_limits_and_the_best_matrix_instructions(of_step):
    assert resources.violations(of_step) == []


def test_row_kernels_move_128_bits_at_a_time(of_step):
    rows = [r for r in of_step if r.kernel in ROW_KERNELS]
    assert {r.kernel for r in rows} == ROW_KERNELS
    assert [r for r in rows if r.code.load_bits < 128 or r.code.store_bits < 128] == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(resources.CHIP_OF.keys() - {90}))
def test_other_chips(capability):
    of_step = [r for r in compile_for(capability) if r.call == step.PRESET]
    test_no_spills_shared_memory_within_limits_and_the_best_matrix_instructions(of_step)
    test_row_kernels_move_128_bits_at_a_time(of_step)
    assert {r.kernel for r in of_step} == all_kernels() - OF_WIDE_ROWS


def test_decode_reads_the_cache_128_bits_at_a_time(compiled):
    """Both kernels, and the first also in fp32 and fp16, at head_dims and lengths other than GPT-2's. It multiplies
    by no matrix instruction: with one query, it would be idle in all rows but one."""
    decode = [r for r in compiled if r.kernel.startswith("_decode_attention_") and r.call != "decode odd"]
    assert {(r.call, r.capability) for r in decode} == {(step.PRESET, 90), ("decode fp32", 80), ("decode long", 100)}
    assert [r for r in decode if r.code.load_bits < 128 or r.code.has_dot] == []


def test_attention_multiplies_by_wgmma_on_hopper(of_step):
    multiplying = {r.kernel for r in of_step if r.code.mma == "wgmma"}
    assert multiplying == {f"_attention_{name}_kernel" for name in ("fwd", "bwd_dq", "bwd_dkdv")}


def test_rows_that_are_read_twice_stay_in_l2(of_step):
    """Resident programs of the head's kernel have a row each."""
    (r,) = (r for r in of_step if r.kernel == "_linear_cross_entropy_kernel")
    programs = r.occupancy * r.chip.threads_per_sm / r.code.threads * r.chip.n_sms
    assert programs * VOCABULARY * 2 <= CHIPS["H100"].l2_bytes


def test_operands_are_rounded_for_tf32_and_only_there(compiled):
    by_call = {name: [(r.tf32, r.rounds) for r in compiled if r.call == name] for name in ("tf32", "fp32", "bf16")}
    assert by_call == {"tf32": [(True, True)] * 3, "fp32": [(False, False)], "bf16": [(False, False)]}


def test_real_tensors_are_compiled_as_the_tuner_has_them(compiled):
    (r,) = (r for r in compiled if r.call == "real")
    assert (r.kernel, r.capability, r.code.spills, r.code.shared) == ("_gelu_fwd_kernel", 80, 0, 0)
    assert 16 <= r.code.registers <= 255 and (r.code.load_bits, r.code.store_bits) == (128, 128)


def test_odd_lengths_and_head_dims_do_not_spill(compiled):
    calls = ("odd", "wide", "widest", "decode fp32", "decode odd", "decode long")
    spills = {(r.call, r.kernel): r.code.spills for r in compiled if r.call in calls}
    assert len(spills) == 3 + 2 + 4 + 3 * 2 and not any(spills.values()), spills


def test_what_breaks_a_limit_is_named(of_step):
    (good,) = (r for r in of_step if r.kernel == "_attention_fwd_kernel")
    for broken, what in (
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"mma": "mma"}, "multiplies by mma, not wgmma"),
        ({"serialised": True}, "serialises wgmma"),
    ):
        (line,) = resources.violations([good._replace(code=good.code._replace(**broken))])
        assert what in line


def test_widths_are_read_off_the_code():
    for ptx, load_bits, store_bits in (
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\nld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 128, 0),
        ("ld.global.L1::evict_first.L2::cache_hint.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ], %rd4;", 128, 0),
        ("@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];", 32, 0),
        ("ld.global.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd1 + 0 ];", 256, 0),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 128, 0),
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];\nst.global.b16 [ %rd1 + 0 ], { %rs1 };", 0, 16),
        ("@%p1 st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", 0, 128),
    ):
        found = machine_code._widest(ptx, "ld"), machine_code._widest(ptx, "st")
        assert found == (load_bits, store_bits), ptx


def test_occupancy_is_that_of_the_calculator():
    for registers, shared, n_warps, expected in (
        (33, 0, 4, 0.75),  # registers come in units of 8 per thread
        (64, 0, 4, 0.5),
        (255, 0, 4, 0.125),
        (32, 100 * 1024, 4, 0.125),  # two blocks, and the KiB that the system takes of each
        (32, 227 * 1024, 8, 0.125),
        (16, 0, 1, 0.5),  # 32 blocks at most
    ):
        assert occupancy(CHIPS["H100"], registers, shared, n_warps) == expected, (registers, shared, n_warps)
