"""The least number of bytes and FLOPs of a call, with which measurements of the kernels are compared."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The compulsory work of one call: each input is read once, and each output written once."""

    bytes: int
    """read and written in device memory"""
    flops: int
    """additions and multiplications; a transcendental function counts as one"""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)
