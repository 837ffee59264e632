"""What a call launches, seen from outside and without a GPU.

The real code runs on fake tensors (shapes, strides and dtypes, no memory), so shapes are those of the real model and
nothing is typed twice. A dispatch mode on top of them sees every operation of torch; an operation of ours is opened,
so that its launcher runs, and each `kernel[grid](...)` in it is noted down instead of run. The fake tensors
are the CPU's, since torch without CUDA differentiates no others, so what a GPU would decide is put in place:
`is_cuda`, `launch.capability`, operations over lists of tensors, and what CUDA's autocast casts.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.machine_code import specialise as specialise  # what is noted here can be compiled
from kernels import launch
from kernels.ops import Ops, triton_ops


class Tensor(NamedTuple):
    """What is to be known of a tensor, without holding it: one that is held is never freed, and its gradient copied."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """of its first element in its storage, in bytes"""
    storage: int
    """equal for tensors of one call that share memory"""

    @property
    def bytes(self) -> int:
        """Of the distinct elements: a dimension with stride 0 counts once."""
        n_elements = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            n_elements *= size if stride or not size else 1
        return n_elements * self.dtype.itemsize


def describe(value: Any) -> Any:
    """A tensor as a `Tensor`, anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    offset = int(value.storage_offset()) * value.element_size()
    storage = value.untyped_storage()._cdata
    return Tensor(tuple(value.shape), tuple(value.stride()), value.dtype, offset, storage)


class Launch(launch.Call):
    """One launch of a kernel of ours; tensors among its arguments as `Tensor`."""

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def bytes(self) -> int:
        """Each tensor once; twice where what is read is overwritten."""
        n_bytes = sum(arg.bytes for arg in self.args.values() if isinstance(arg, Tensor))
        return n_bytes + sum(self.args[name].bytes for name in OVERWRITTEN.get(self.name, ()))


OVERWRITTEN = {"_linear_cross_entropy_kernel": ("logits_ptr",)}


class Event(NamedTuple):
    """One operation that launches something on a GPU, torch's or ours, in the order of the trace."""

    name: str
    """aten::mm, or the name of a kernel of ours"""
    launches: int
    bytes: int
    """each tensor that it reads once, each that it writes once"""
    flops: int
    """of matrix products; 0 for everything else"""
    matmul: bool
    launch: Launch | None


class Trace(TorchDispatchMode):
    """Note down what is launched, and how much memory is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: weakref.WeakSet = weakref.WeakSet()

    def restart(self) -> None:
        """Forget what was noted; what is alive stays alive."""
        self.events.clear()
        self.peak_bytes = self.live_bytes

    @property
    def launches(self) -> list[Launch]:
        return [event.launch for event in self.events if event.launch]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = OPDEFS.get(func._schema.name) if func.namespace == "tritongpt" else None
        if ours:
            with self:
                out = ours._init_fn(*args, **kwargs)
        elif func.namespace != "aten":
            return func(*args, **kwargs)
        else:
            with self:  # what is made of other operations is seen as those
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            out = func(*args, **kwargs)
            n_launches = launches_of(func, args)
            if n_launches:
                self._note_torch(func, args, kwargs, out, n_launches)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf)
        return out

    def note(self, call: launch.Call) -> None:
        """Note down a launch of a kernel of ours."""
        noted = Launch(*call)._replace(args={name: describe(arg) for name, arg in call.args.items()})
        self.events.append(Event(noted.name, 1, noted.bytes, 0, False, noted))

    def _note_torch(self, func, args, kwargs, out, n_launches: int) -> None:
        name = func._schema.name
        n_bytes, n_flops = bytes_of(func, args, kwargs, out), flops_of(name, args, out)
        self.events.append(Event(name, n_launches, n_bytes, n_flops, name in MATMULS, None))

    def _track(self, tensor: torch.Tensor) -> None:
        """Count a storage from its birth to its death."""
        storage = tensor.untyped_storage()
        if storage not in self._storages:
            self._storages.add(storage)
            n_bytes = storage.nbytes()
            self.live_bytes += n_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, n_bytes)

    def _forget(self, n_bytes: int) -> None:
        self.live_bytes -= n_bytes


MATMULS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::_local_scalar_dense")


def launches_of(func: torch._ops.OpOverload, args: tuple) -> int:
    """Kernels that torch launches on a GPU for one operation, at least: a sort, or the second kernel of a split
    reduction, is not known before it runs and is not counted.
    """
    name = func._schema.name
    if func.is_view or name.startswith(_NO_LAUNCH):
        return 0
    if name.startswith(("aten::_foreach", "aten::_fused")):
        return _multi_tensor_launches(args)
    return {
        "aten::native_layer_norm_backward": 2,  # dx; dw and db
        "aten::masked_fill": 2,  # a copy, then the fill
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # on a GPU: delta; dq, dk, dv; dq to 16 bit
    }.get(name, 1)


def _multi_tensor_launches(args: tuple) -> int:
    """Launches over lists of tensors: at most 320 blocks of 65,536 elements, and so many tensors, fit in the arguments
    of one (aten/src/ATen/native/cuda/MultiTensorApply.cuh)."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], torch.Tensor)]
    most_tensors = (110, 64, 48, 36, 30)[min(len(lists), 5) - 1]
    launches, tensors, blocks = 1, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(triton.cdiv(tensor.numel(), 65536)):
            if blocks == 320 or tensors > most_tensors:
                launches, tensors, blocks = launches + 1, 1, 0
            blocks += 1
    return launches


def bytes_of(func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operation of torch moves at least: what it reads once, what it writes once."""
    inputs = (args[kwargs.get("beta") == 0 :], {k: v for k, v in kwargs.items() if k != "out"})
    read = {id(leaf): leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
    written = {id(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write and position < len(args):
            if func._schema.name.startswith("aten::_fused") and argument.name == "grads":
                continue  # declared for the scaler's sake
            written |= {id(leaf): leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, torch.Tensor)}
    if func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_"):
        read.pop(id(args[0]), None)
    if func._schema.name == "aten::embedding":  # the rows that are looked up, not the table
        read.pop(id(args[0]), None)
        return 2 * describe(out).bytes + describe(args[1]).bytes
    return sum(describe(tensor).bytes for tensor in [*read.values(), *written.values()])


def flops_of(name: str, args: tuple, out: Any) -> int:
    """Of matrix products, and of causal attention half of those of the full square."""
    if name in MATMULS:
        a = args[name in ("aten::addmm", "aten::baddbmm")]
        return 2 * out.numel() * a.shape[-1]
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return 2 * args[0].numel() * args[0].shape[2]
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":  # five products, one of them again
        return 5 * args[1].numel() * args[1].shape[2]
    return 0


class _CudaAutocast(TorchFunctionMode):
    """CPU autocast casts the inputs of matrix products, as CUDA's does, and leaves alone what CUDA's computes in fp32:
    of that list (https://docs.pytorch.org/docs/stable/amp.html) this has what the eager model calls."""

    FP32 = frozenset(
        {F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.pow, torch.softmax, torch.log_softmax}
        | {torch.Tensor.pow, torch.Tensor.softmax, torch.Tensor.log_softmax}
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs)
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def trace(capability: int = 90) -> Iterator[Trace]:
    """Everything in this block runs on fake tensors, made on the device "cpu", as on a GPU of that capability."""
    tracing = Trace()
    with (
        launch.DryRun(capability, tracing.note),
        mock.patch.object(FakeTensor, "is_cuda", True, create=True),
        mock.patch.object(clip_grad, "_has_foreach_support", lambda *args: True),
        FakeTensorMode(),
        _CudaAutocast(),
        tracing,
    ):
        yield tracing


def our_ops() -> Ops:
    """The kernels, for whichever of the two ways in which this process has them: a trace runs neither."""
    return triton_ops("cpu" if triton.knobs.runtime.interpret else "cuda")


def fake_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """Replace the parameters of a module by fake ones, in place; tied ones stay tied."""
    fakes: dict[torch.Tensor, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in fakes:
                    fakes[parameter] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                part._parameters[name] = fakes[parameter]
    return module
