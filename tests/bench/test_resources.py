"""Compiled for three chips without a GPU, every kernel keeps within its means."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from bench import machine_code, resources
from bench.chips import CHIPS
from bench.resources import Resources
from bench.traffic import VOCABULARY

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import json
from kernels import interpreter
interpreter.choose("cuda")
from bench import machine_code, resources
print(json.dumps([r._asdict() for r in resources.resources(presets=["d12"])]))
"""
ROW_KERNELS = {
    *("_gelu_fwd_kernel", "_gelu_bwd_kernel", "_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"),
    *("_embedding_fwd_kernel", "_linear_cross_entropy_kernel"),
}
"""that move rows whose width allows 128 bits"""


@pytest.fixture(scope="module")
def found() -> list[Resources]:
    """Compiled in a process of its own: this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Resources(**fields) for fields in json.loads(done.stdout)]


def test_every_kernel_on_every_chip(found):
    kernels_of_ours = set()
    for module in pkgutil.iter_modules([str(Path(kernels.__file__).parent)]):
        for name, value in vars(importlib.import_module(f"kernels.{module.name}")).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                kernels_of_ours.add(name)
    for capability in resources.CHIP_OF:
        assert {r.kernel for r in found if r.capability == capability} == kernels_of_ours


def test_no_spills_shared_memory_within_limits_and_the_best_matrix_instructions(found):
    assert resources.violations(found) == []


def test_row_kernels_move_128_bits_at_a_time(found):
    rows = [r for r in found if r.kernel in ROW_KERNELS]
    assert {r.kernel for r in rows} == ROW_KERNELS
    assert [r for r in rows if r.load_bits < 128 or r.store_bits < 128] == []


def test_attention_multiplies_by_wgmma_on_hopper(found):
    multiplying = {r.kernel for r in found if r.capability == 90 and r.mma == "wgmma"}
    assert {name.partition("_")[2].split("_")[1] for name in multiplying if "attention" in name} >= {"fwd", "bwd"}


def test_rows_that_are_read_twice_stay_in_l2(found):
    """Resident programs of the head's kernel have a row each."""
    for r in found:
        if r.kernel == "_linear_cross_entropy_kernel" and r.capability == 90:
            programs = r.occupancy * r.chip.threads_per_sm / r.threads * r.chip.n_sms
            assert programs * VOCABULARY * 2 <= CHIPS["H100"].l2_bytes


def test_what_is_below_is_told(found):
    good = found[0]
    assert resources.violations([good]) == []
    assert "spills 8 bytes" in resources.violations([good._replace(spills=8)])[0]
    assert "shared memory" in resources.violations([good._replace(shared=228 * 1024)])[0]
    bad = good._replace(capability=90, has_dot=True, mma="mma")
    assert "multiplies by mma, not wgmma" in resources.violations([bad])[0]


@pytest.mark.parametrize(
    ("sass", "bits"),
    [
        ("LDG.E.128 R4, [R2]; LDG.E.64 R4, [R2];", 128),
        ("LDG.E R4, [R2];", 32),
        ("LDG.E.U16 R4, [R2];", 16),
        ("LDGSTS.E.BYPASS.128 [R9], [R2];", 128),
        ("UTMALDG.2D [UR8], [UR4];", 128),
        ("LDG.E.ENL2.256 R4, R8, [R2];", 256),
        ("STG.E.128 [R2], R4;", 0),
    ],
)
def test_widths_are_read_off_the_machine_code(sass, bits):
    assert machine_code._widest(sass, "LDG|LDGSTS", "UTMALDG") == bits
