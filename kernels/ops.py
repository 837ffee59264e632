"""The table of ops. A backend is a value of type `Ops`, and the model calls the functions in it.

To mix backends, replace an entry: `triton_ops("cuda")._replace(attention=EAGER.attention)`, or on the command line
`--backend triton,attention=eager`. `kernels/eager.py` documents the arguments and results of every op; all backends
have the same signatures. Only `triton_ops` imports triton.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels import eager, interpreter, sublayer
from kernels.sublayer import Affine, Stream


class Ops(NamedTuple):
    """One function per op. Shapes: B batch, T sequence, C width, V vocabulary."""

    embedding: Callable[..., torch.Tensor]
    """(idx (B, T), token_weight (V, C), position_weight (block_size, C), dtype=None) -> (B, T, C)"""
    layer_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(x (..., C), weight, bias) -> (..., C)"""
    add_layer_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(residual, branch, weight, bias, branch_bias=None) -> (residual + (branch + branch_bias), its layer_norm)"""
    gelu: Callable[[torch.Tensor], torch.Tensor]
    """x -> same shape"""
    attention: Callable[[torch.Tensor, int], torch.Tensor]
    """(qkv (B, T, 3C), n_head) -> (B, T, C)"""
    decode_attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(q (B, H, D), k_cache (B, H, T, D), v_cache, lengths (B,)) -> (B, H, D)"""
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(logits (..., V), targets (...)) -> ()"""
    linear_cross_entropy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(hidden (..., C), weight (V, C), targets (...)) -> ()"""

    def attention_sublayer(
        self,
        stream: Stream,
        norm: Affine,
        linear: Affine,
        out: Affine,
        n_head: int,
        recompute: int = 0,
        leave_bias: bool = False,
    ) -> Stream:
        """The first half of a block: attention of the normalised stream.

        Args:
            stream: the residual stream, (B, T, C).
            norm: weight and bias of the LayerNorm, (C,) each.
            linear: weight (3C, C) and bias (3C,) of the projection to q, k and v.
            out: weight (C, C) and bias (C,) of the projection back.
            n_head: number of heads, a divisor of C.
            recompute: what backward recomputes instead of saving it: 0 nothing, 1 GELU, 2 also LayerNorm.
            leave_bias: whether the bias of `out` may be left in the result, for the next LayerNorm to add. It needs the
                parameter again, so not where that is freed after use.

        Returns:
            The stream, to which this half has added a branch.
        """
        fused = _FUSED.get((self.layer_norm, self.add_layer_norm, self.attention))
        after = fused and fused(stream, norm, linear, out, n_head, recompute, leave_bias)
        return after or sublayer.attention(self, stream, norm, linear, out, n_head, recompute)

    def mlp_sublayer(
        self, stream: Stream, norm: Affine, linear: Affine, out: Affine, recompute: int = 0, leave_bias: bool = False
    ) -> Stream:
        """The second half of a block: two linear layers with a GELU between them.

        Args:
            linear: weight (4C, C) and bias (4C,).
            out: weight (C, 4C) and bias (C,).
            stream, norm, recompute, leave_bias: as in `attention_sublayer`.

        Returns:
            The stream, to which this half has added a branch.
        """
        fused = _FUSED.get((self.layer_norm, self.add_layer_norm, self.gelu))
        after = fused and fused(stream, norm, linear, out, None, recompute, leave_bias)
        return after or sublayer.mlp(self, stream, norm, linear, out, recompute)

    def causal_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`attention` of separate tensors, for networks that do not pack them.

        Args:
            q, k, v: (B, H, T, D) each, of any strides.

        Returns:
            (B, H, T, D).
        """
        if self.attention in _SEPARATE:
            return _SEPARATE[self.attention](q, k, v)
        B, H, T, D = q.shape
        qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=2)
        return self.attention(qkv, H).view(B, T, H, D).transpose(1, 2)


FORWARD_ONLY = frozenset({"decode_attention"})
"""ops that have no gradient"""

_FUSED: dict[tuple[Callable, ...], Callable[..., Stream | None]] = {}
"""half a block as one op, by the ops that it replaces; `triton_ops` fills it, so that nothing else imports triton"""

_SEPARATE: dict[Callable, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {}
"""attention of separate tensors, by the packed attention that it equals; `triton_ops` fills it too"""

EAGER = Ops(*(getattr(eager, name) for name in Ops._fields))
SDPA = EAGER._replace(attention=eager.sdpa_attention, decode_attention=eager.sdpa_decode_attention)


@functools.cache
def triton_ops(device_type: str) -> Ops:
    """The hand-written kernels, compiled for a GPU ("cuda") or interpreted ("cpu"). A process has one of the two.

    Raises:
        ImportError: triton is not installed.
        ValueError: the kernels do not run on this type of device.
        RuntimeError: this process already has the kernels for the other type of device.
    """
    interpreter.choose(device_type)
    from kernels import attention, cross_entropy, decode, embedding, fused_sublayer, gelu, layer_norm

    table = Ops(
        embedding=embedding.embedding,
        layer_norm=layer_norm.layer_norm,
        add_layer_norm=layer_norm.add_layer_norm,
        gelu=gelu.gelu,
        attention=attention.attention,
        decode_attention=decode.decode_attention,
        cross_entropy=cross_entropy.cross_entropy,
        linear_cross_entropy=cross_entropy.linear_cross_entropy,
    )
    for op in (table.attention, table.gelu):
        _FUSED[table.layer_norm, table.add_layer_norm, op] = fused_sublayer.fused
    _SEPARATE[table.attention] = attention.causal_attention
    return table


def default_backend(device_type: str, elsewhere: str = "eager") -> str:
    """triton where there is a GPU and triton is installed for it (Windows has none), and `elsewhere` where not."""
    return "triton" if device_type == "cuda" and importlib.util.find_spec("triton") else elsewhere


def parse(spec: str, device_type: str) -> Ops:
    """The table that a string describes.

    Args:
        spec: a backend (triton, eager or sdpa), then ops from another one, as in "triton,attention=sdpa".
        device_type: where triton's ops will run, "cuda" or "cpu"; see `triton_ops`.

    Raises:
        ValueError: unknown backend or op. If the string names triton, also as in `triton_ops`.
    """
    tables: dict[str, Callable[[], Ops]] = {
        "triton": lambda: triton_ops(device_type),
        "eager": lambda: EAGER,
        "sdpa": lambda: SDPA,
    }
    base, *exceptions = spec.split(",")
    by_op = {op: backend for op, _, backend in (exception.partition("=") for exception in exceptions)}
    for name in (base, *by_op.values()):
        if name not in tables:
            raise ValueError(f"unknown backend {name!r}; choose from {', '.join(tables)}")
    for op in by_op:
        if op not in Ops._fields:
            raise ValueError(
                f"unknown op {op!r}; choose from {', '.join(Ops._fields)}, as in {base},{Ops._fields[0]}=eager"
            )
    # Last, because triton_ops prepares this process for triton.
    return tables[base]()._replace(**{op: getattr(tables[backend](), op) for op, backend in by_op.items()})
