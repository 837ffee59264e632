"""Ranks: who this process is, what it computes on, and how the ranks agree.

The loop is the same for one process and for many: with one rank, every function here is what it says and no more.
"""

import os
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import BadInput

DEVICES = ("cuda", "mps", "cpu")


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    distributed: bool
    """True under torchrun, also with a single rank"""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0


def start(device: str = "", zero_stage: int = 0) -> World:
    """Find the device and, under torchrun, join the process group: NCCL on GPUs, gloo elsewhere.

    Args:
        device: "cuda", "cuda:1", "mps", "cpu", or "" for the first kind that is there.
        zero_stage: what is going to be sharded; anything above 0 takes ranks.

    Raises:
        BadInput: no such device here, or a ZeRO stage outside torchrun.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, index = device.partition(":")
    if kind and kind not in DEVICES:
        raise BadInput(f"--device {device} is unknown; choose cuda, mps or cpu, or leave it out")
    kind = kind or next(name for name in DEVICES if available[name])
    if not available[kind]:
        here = ", ".join(name for name in DEVICES if available[name])
        raise BadInput(f"--device {device}: there is none here; leave the flag out, or choose from: {here}")
    if index and not (kind == "cuda" and index.isdecimal() and int(index) < torch.cuda.device_count()):
        raise BadInput(f"--device {device}: there is no such device here; leave the number out")

    distributed = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if zero_stage and not distributed:
        raise BadInput(
            f"--zero_stage {zero_stage} shards over ranks: start it as torchrun --nproc_per_node GPUS train.py ..., "
            "or use --zero_stage 0"
        )
    rank, local_rank, size = (
        (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")) if distributed else (0, 0, 1)
    )
    if distributed and kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f"--nproc_per_node asks for more ranks than the {torch.cuda.device_count()} GPUs here")
        index = local_rank
    chosen = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    if distributed:
        if kind == "cuda":
            dist.init_process_group("nccl", device_id=chosen)
        else:
            dist.init_process_group("gloo")
    return World(rank, local_rank, size, chosen, distributed)


def stop(world: World) -> None:
    """Leave the process group."""
    if world.distributed:
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.distributed:
        dist.barrier()


def data_parallel(model: torch.nn.Module, world: World) -> torch.nn.Module:
    """Let the backward of `model` average its gradients over the ranks (DistributedDataParallel)."""
    if not world.distributed:
        return model
    return DistributedDataParallel(model, device_ids=[world.local_rank] if world.device.type == "cuda" else None)


def synchronise_gradients(model: torch.nn.Module, now: bool) -> None:
    """Say whether the next forward and backward average the gradients, or leave them to accumulate on each rank."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now


def mean(values: torch.Tensor, world: World) -> torch.Tensor:
    """The mean over the ranks of a small tensor on the world's device, the same bits on every rank."""
    if world.distributed:
        values = values.clone()
        dist.all_reduce(values)
        values /= world.size
    return values


class StopRequest:
    """Ctrl-C asks the run to end after the step at hand; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> "StopRequest":
        """Listen to SIGINT from now on."""
        signal.signal(signal.SIGINT, self._on_signal)
        return self

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
