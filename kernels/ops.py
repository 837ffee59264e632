"""The table of ops. A backend is a value of type `Ops`, and the model calls the functions in it.

To mix backends, replace an entry: `triton_ops("cuda")._replace(attention=EAGER.attention)`, or on the command line
`--backend triton,attention=eager`. `kernels/eager.py` documents the arguments and results of every op; all backends
have the same signatures. Only `triton_ops` imports triton.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels import eager, interpreter


class Ops(NamedTuple):
    """One function per op. Shapes: B batch, T sequence, C width, V vocabulary."""

    embedding: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(idx (B, T), token_weight (V, C), position_weight (block_size, C)) -> (B, T, C)"""
    layer_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(x (..., C), weight, bias) -> (..., C)"""
    add_layer_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(residual, branch, weight, bias, branch_bias=None) -> (residual + (branch + branch_bias), its layer_norm)"""
    gelu: Callable[[torch.Tensor], torch.Tensor]
    """x -> same shape"""
    attention: Callable[[torch.Tensor, int], torch.Tensor]
    """(qkv (B, T, 3C), n_head) -> (B, T, C)"""
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(logits (..., V), targets (...)) -> ()"""
    linear_cross_entropy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(hidden (..., C), weight (V, C), targets (...)) -> ()"""

    @property
    def block(self) -> Callable | None:
        """A function that runs a whole block in one call, bitwise identical to these ops; None if there is none."""
        return _BLOCKS.get((self.layer_norm, self.add_layer_norm, self.gelu, self.attention))


_BLOCKS: dict[tuple[Callable, ...], Callable] = {}
"""by (layer_norm, add_layer_norm, gelu, attention); `triton_ops` fills it, so that nothing else imports triton"""

EAGER = Ops(*(getattr(eager, name) for name in Ops._fields))
SDPA = EAGER._replace(attention=eager.sdpa_attention)
EAGER_SDPA = SDPA  # the same, by its older name


@functools.cache
def triton_ops(device_type: str) -> Ops:
    """The hand-written kernels, compiled for a GPU ("cuda") or interpreted ("cpu"). A process has one of the two.

    Raises:
        ImportError: triton is not installed.
        ValueError: the kernels do not run on this type of device.
        RuntimeError: this process already has the kernels for the other type of device.
    """
    interpreter.choose(device_type)
    from kernels import attention, block, cross_entropy, embedding, gelu, layer_norm

    table = Ops(
        embedding=embedding.embedding,
        layer_norm=layer_norm.layer_norm,
        add_layer_norm=layer_norm.add_layer_norm,
        gelu=gelu.gelu,
        attention=attention.attention,
        cross_entropy=cross_entropy.cross_entropy,
        linear_cross_entropy=cross_entropy.linear_cross_entropy,
    )
    _BLOCKS[table.layer_norm, table.add_layer_norm, table.gelu, table.attention] = block.block
    return table


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
