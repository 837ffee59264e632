"""Where the kernels run: on an NVIDIA GPU or, without one, in Triton's interpreter (NumPy, one program at a time).

Triton decides between the two when it is imported, so `choose` has to be called before. It is the only place that
chooses. `_make_honest` corrects what the interpreter gets wrong, so that bfloat16, dots and masked loads behave as on a
GPU.
"""

import functools
import importlib.util
import os
import sys

import torch

INSTALL = "pip install 'triton>=3.6,<3.8' (Linux only)"


def choose(device_type: str) -> None:
    """Prepare triton for this process, before its first import. The same choice may be repeated.

    Args:
        device_type: "cuda" compiles for the GPU, "cpu" interprets.

    Raises:
        ImportError: triton is not installed.
        ValueError: the kernels do not run on this type of device.
        RuntimeError: triton is already imported for the other choice.
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
    """Correct the interpreter. Returns False if it was corrected before.

    - bf16 casts round to nearest even, and bf16 dots multiply numbers (the interpreter stores bf16 as bits in uint16).
    - TF32 dots drop the last 13 bits of both operands, as tensor cores do.
    - The sum in a dot does not depend on which operand comes first. A GPU adds the products of q·kᵀ and of k·qᵀ in one
      order, so that backward, which transposes the matrix, recomputes the very scores of forward. NumPy's BLAS chooses
      another order on every CPU.
    - A masked load without `other` gives NaN, where a GPU gives anything. The interpreter's 0 would hide the mistake.

    All this patches private API: pyproject.toml pins triton, and tests/kernels/test_interpreter.py tests the patch.
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
    # The original builds a table of all dtypes at each call.
    np_dtype, np_pointer = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)

    def patch_lang_once(fn):
        """At every call of a device function the original goes through all of triton.language, in a third of a kernel's
        time, to patch what the launch of the kernel has patched."""
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
        total = np.matmul(a, b, dtype=np.float64) + d.data  # rounded once, so that the order does not matter
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
    interpreter._get_np_dtype = lambda dtype: np_pointer if dtype.scalar.is_ptr() else np_dtype(dtype.scalar)
    # The original computes at each addition of integers whether it overflows, and reports it only with debug=True.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    return True
