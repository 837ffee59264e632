"""CUDA graphs: the kernels of a call, which the host launches at once, on the same addresses each time.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

WARM_UP = 3
"""runs of a call before its capture: by then kernels are compiled and loaded, libraries have their workspaces, and
AdamW its moments, which every replay would zero if they were made in a capture"""

T = TypeVar("T")


class Graphs(Protocol):
    """How a call is run, captured and replayed."""

    def run(self, call: Callable[[], T]) -> T:
        """Call it, without a graph."""

    def capture(self, call: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """Call it without running its kernels. Returns its result, and the function that runs them: it writes the
        result, and every other tensor that the call made."""


class CudaGraphs:
    """Graphs of torch, all on one stream beside the device's first, which cannot be captured."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def run(self, call: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def capture(self, call: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        graph = torch.cuda.CUDAGraph()
        # What other threads do is none of its business: one may be writing a checkpoint.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = call()
        return result, graph.replay


class GraphedCall(Generic[T]):
    """A call that is run WARM_UP times, then captured, then replayed.

    Args:
        call: takes its inputs from tensors that stay where they are, and decides nothing on the host. It is kept, since
            a graph holds addresses and no tensors.
        graphs: how; tests have a stand-in.
    """

    def __init__(self, call: Callable[[], T], graphs: Graphs):
        self.call, self.graphs = call, graphs
        self.runs = 0
        self.captured: tuple[T, Callable[[], object]] | None = None

    def __call__(self) -> T:
        """Launch it. The next call overwrites the result."""
        if self.runs < WARM_UP:
            self.runs += 1
            return self.graphs.run(self.call)
        if self.captured is None:
            self.captured = self.graphs.capture(self.call)
        result, replay = self.captured
        replay()
        return result
