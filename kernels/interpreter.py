"""Where the kernels run: on an NVIDIA GPU, or, without one, in Triton's interpreter (NumPy, a program at a time).

Triton decides between the two when it is imported, so `choose` has to come before that, and it is the only place that
chooses. Triton's interpreter gets some things wrong that a GPU gets right; `_make_honest` mends them, so that bfloat16,
dots and masked loads mean the same in both.
"""

import importlib.util
import os
import sys

import torch

INSTALL = "pip install 'triton>=3.6,<3.8' (Linux only)"


def choose(device_type: str) -> None:
    """Prepare triton for this process, before its first import; the same choice may be repeated.

    Args:
        device_type: "cuda" compiles for the GPU, "cpu" interprets.

    Raises:
        ImportError: triton is not installed.
        ValueError: no kernel runs on such a device.
        RuntimeError: triton is already imported, for the other of the two.
    """
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f"triton kernels run on cuda, or interpreted on cpu; not on {device_type}")
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"the triton backend needs triton: {INSTALL}; the eager backend needs nothing")
    interpret = device_type == "cpu"
    if interpret and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton

    if triton.knobs.runtime.interpret != interpret:
        now, need = ("compiled for a GPU", "") if interpret else ("interpreted", ", with TRITON_INTERPRET unset")
        raise RuntimeError(
            f"in this process triton kernels are {now} already; use {device_type} in a process of its own{need}"
        )
    if interpret and _make_honest() and os.environ.get("RANK", "0") == "0":
        print("triton: no GPU in use, so kernels run in Triton's interpreter: exact, and very slow", file=sys.stderr)


def _make_honest() -> bool:
    """Mend the interpreter: bf16 casts round to nearest even, bf16 dots multiply numbers, TF32 dots drop the last 13
    bits of both operands as tensor cores do, the sum in a dot does not depend on which operand comes first, and a
    masked load without `other` gives NaN where a GPU gives whatever it likes (the interpreter's 0 would hide the
    mistake).

    A GPU adds the products of q·kᵀ and of k·qᵀ in one order, so that a backward pass that turns the matrix round finds
    the scores of the forward pass again, to the bit. NumPy leaves the order to its BLAS, which has one for every CPU.

    The interpreter keeps bf16 as its bits in uint16. This reaches into private API, so pyproject.toml pins triton and
    tests/kernels/test_interpreter.py says whether it still holds. Returns False where it was done before.
    """
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "is_honest"):
        return False
    InterpreterBuilder.is_honest = True
    cast, masked_load = InterpreterBuilder.cast_impl, InterpreterBuilder.create_masked_load
    patch_lang = interpreter._patch_lang

    def patch_lang_once(fn):
        """For each call of a device function it looks through all of triton.language, a third of a kernel's time, to
        put in place what the launch of the kernel has put there."""
        langs = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if langs and not any(tl.core.is_builtin(lang.load) for lang in langs):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    def to_fp32(handle: TensorHandle) -> TensorHandle:
        bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
        return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    def to_bf16(handle: TensorHandle) -> TensorHandle:
        values = torch.from_numpy(np.ascontiguousarray(handle.data, np.float32))
        return TensorHandle(values.bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def honest_cast(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16:
            src = to_fp32(src)
        return to_bf16(src) if dst_type.scalar == tl.bfloat16 else cast(self, src, dst_type)

    def operand(handle: TensorHandle, input_precision) -> np.ndarray:
        if handle.dtype.scalar == tl.float32 and input_precision == INPUT_PRECISION.TF32:
            return (handle.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return to_fp32(handle).data if handle.dtype.scalar == tl.bfloat16 else handle.data

    def honest_dot(self, a, b, d, input_precision, *args):
        a, b = operand(a, input_precision), operand(b, input_precision)
        total = np.matmul(a, b, dtype=np.float64) + d.data  # to be rounded once, whatever the order was
        return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    def honest_masked_load(self, ptrs, mask, other, *args):
        if other is None and not mask.data.all():
            dtype = ptrs.get_element_ty()
            kind = np.dtype(f"int{dtype.primitive_bitwidth}")
            junk = np.full_like(ptrs.data, -1, kind)  # all bits set: NaN in every float
            other = TensorHandle(junk.view(f"float{dtype.primitive_bitwidth}") if dtype.is_floating() else junk, dtype)
            if dtype.scalar == tl.bfloat16:
                other.data = junk.view(np.uint16)
        return masked_load(self, ptrs, mask, other, *args)

    InterpreterBuilder.cast_impl = honest_cast
    InterpreterBuilder.create_dot = honest_dot
    InterpreterBuilder.create_masked_load = honest_masked_load
    interpreter._patch_lang = patch_lang_once
    return True
