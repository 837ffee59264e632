"""`--cuda_graph 1`: the kernels of an update as CUDA graphs, each of which the host launches at once.

Small batches and small networks wait for Python and for launches, one by one. A CUDA graph is captured once and
replayed at every step: the same kernels on the same addresses. So inputs and learning rate are written to tensors that
stay where they are, and gradients, loss and norm are found where the capture put them. The largest norm is a constant.

There are two graphs, since between them the host reads loss and norm, and decides whether to accept the update: first
the gradients of all micro-batches and the clip, then AdamW. The first steps of a run are its warm-up: they run as they
would without a graph, and count. Every step has the bits of a step without graphs: the kernels are the same, gradients
begin as None in the capture too, so that the first micro-batch's are stored and not added to zeros, and the learning
rate is fp32 either way (`optim.set_learning_rate`).

The gradients stay in memory, and so does what the activations need in the first graph: validation and samples, which
run as ever, need memory of their own.
"""

import warnings
from collections.abc import Iterable

import torch

from common import BadInput
from model.cuda_graph import CudaGraphs, GraphedCall, Graphs
from training.checkpoint import TrainState
from training.config import Config
from training.distributed import World
from training.step import Batch, Update


class GraphedUpdate(Update):
    """`Update` by CUDA graphs.

    Args:
        config, world, state, model: as for `Update`; `require_one_gpu` has taken them.
        graphs: how; tests have a stand-in.
    """

    def __init__(self, config: Config, world: World, state: TrainState, model: torch.nn.Module, graphs: Graphs):
        super().__init__(config, world, state, model)

        def ids() -> torch.Tensor:
            shape = config.batch_size, config.sequence_length
            return torch.zeros(shape, dtype=torch.int64, device=world.device)

        self.inputs = [(ids(), ids()) for _ in range(self.grad_accum_steps)]
        self.lr = torch.zeros((), dtype=torch.float32, device=world.device)
        for group in state.optimizer.param_groups:
            group["lr"], group["capturable"] = self.lr, True
        # The warm-up is not captured, of which AdamW warns. The fused form does the same either way.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True", UserWarning)
        self._gradients = GraphedCall(lambda: Update.gradients(self, self.inputs), graphs)
        self._step = GraphedCall(state.optimizer.step, graphs)

    def gradients(self, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        for statics, batch in zip(self.inputs, batches, strict=False):  # so many are read, and no more
            for static, ids in zip(statics, batch, strict=True):
                static.copy_(ids)
        if not self._gradients.captured:  # afterwards these are the tensors that a replay writes
            self.state.optimizer.zero_grad(set_to_none=True)
        return self._gradients()

    def apply(self, lr: float, accepted: bool) -> None:
        if accepted:
            self.lr.fill_(lr)
            self._step()


def require_one_gpu(config: Config, world: World) -> None:
    """Check that `--cuda_graph` can do here what it is asked for.

    Raises:
        BadInput: this is no NVIDIA GPU, or there are ranks.
    """
    if config.cuda_graph and world.distributed:
        raise BadInput(
            "--cuda_graph 1 is for a single process, and this is a rank of torchrun: DDP and FSDP2 decide on the host "
            "what to send when; start train.py without torchrun, or give --cuda_graph 0"
        )
    if config.cuda_graph and world.device.type != "cuda":
        raise BadInput(
            f"--cuda_graph 1 needs an NVIDIA GPU, and this run is on {world.device.type}; give --cuda_graph 0"
        )


def build(config: Config, world: World, state: TrainState, model: torch.nn.Module) -> Update:
    """The updates that the flags ask for. `model` is that of `distributed.parallelize`."""
    if not config.cuda_graph:
        return Update(config, world, state, model)
    return GraphedUpdate(config, world, state, model, CudaGraphs(world.device))
