"""What a call has to move and to compute at least: the measure that every kernel is held against."""

from typing import NamedTuple


class Cost(NamedTuple):
    """The compulsory work of one call: each input read once, each output written once."""

    bytes: int
    """read and written in device memory"""
    flops: int
    """additions and multiplications; a transcendental function counts as one"""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)
