"""What ptxas makes of a launch, ahead of time and without a GPU: registers, spills, shared memory, instructions."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from kernels import launch

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class MachineCode(NamedTuple):
    """A compiled kernel."""

    registers: int
    spills: int
    """bytes of stack per thread: what did not fit into registers"""
    shared: int
    """bytes per block"""
    threads: int
    load_bits: int
    """widest access to global memory of one thread, as Triton asks ptxas for it"""
    store_bits: int
    mma: str
    """tcgen05, wgmma or mma; empty where nothing is multiplied"""
    has_dot: bool
    serialised: bool
    """whether ptxas runs wgmma one by one: it says so in a warning"""


class Specialised(NamedTuple):
    """A launch as Triton's JIT would compile it."""

    source: Any
    options: dict[str, Any]
    target: Any

    def compile(self) -> Any:
        """Compile for the target, or take it from Triton's cache on disk."""
        return triton.compile(self.source, target=self.target, options=self.options)

    @property
    def key(self) -> tuple:
        """Equal for launches that run the same machine code."""
        return (self.source.fn.__name__, self.source.hash(), tuple(sorted(self.options.items())), self.target.arch)


def specialise(call: launch.Call, capability: int) -> Specialised:
    """Derive signature, constexprs and attributes (which pointers and sizes are multiples of 16) as the JIT does.

    Args:
        call: seen in a process that does not interpret; tensors are real, or have `dtype` and `offset`.
        capability: 80, 90 or 100.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = call.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    args = {name: _Pointer(arg) if hasattr(arg, "dtype") else arg for name, arg in call.args.items()}
    bound, specialization, options = binder(**args, **call.options, debug=False)
    options, signature, constexprs, attrs = kernel._pack_args(backend, call.options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return Specialised(source, options.__dict__, target)


class _Pointer:
    """A tensor where the JIT asks for dtype and address: allocations start at multiples of 16."""

    def __init__(self, tensor: Any):
        self.dtype = tensor.dtype
        real = isinstance(tensor, torch.Tensor)
        self._offset = tensor.storage_offset() * tensor.element_size() if real else tensor.offset

    def data_ptr(self) -> int:
        return self._offset

    @staticmethod
    def ptr_range() -> int:
        return 0


def read(specialised: Specialised) -> MachineCode:
    """Compile, and read the machine code."""
    compiled = specialised.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output_of("cuobjdump", "--dump-resource-usage", cubin.name)
    registers, spills = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    ptx = compiled.asm["ptx"]
    mma = next((kind for kind in ("tcgen05.mma", "wgmma.mma", "mma.sync") if kind in ptx), "")
    return MachineCode(
        registers,
        spills,
        compiled.metadata.shared,
        32 * compiled.metadata.num_warps,
        _widest(ptx, "ld"),
        _widest(ptx, "st"),
        mma.partition(".")[0],
        "tt.dot" in compiled.asm["ttir"],
        mma.startswith("wgmma") and _is_serialised(ptx),
    )


def _is_serialised(ptx: str) -> bool:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(BINARIES / "ptxas"), "-arch=sm_90a", file.name, "-o", os.devnull]
        return "serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _output_of(program: str, *args: str) -> str:
    return subprocess.run([BINARIES / program, *args], capture_output=True, text=True, check=True).stdout


def _widest(ptx: str, kind: str) -> int:
    """In bits, of one thread's accesses to global memory: "ld" those that read, also asynchronous copies to shared
    memory, "st" those that write. ptxas keeps their widths."""
    found = re.findall(rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    widths = [int(vector or 1) * int(bits) for vector, bits in found]
    if kind == "ld":
        widths += [8 * int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global.*\], (\w+)", ptx)]
    return max(widths, default=0)
