"""Ranks: which one this process is, its device, how the network is parallelized over them, and how they agree.

The loop is the same for one process and for many: with one rank, these functions do nothing but the obvious.
"""

import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common import BadInput
from model.gpt import GPT

DEVICES = ("cuda", "mps", "cpu")
TIMEOUT_S = 600
"""how long a rank waits for the others by default"""

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""environment variables that torchrun sets for each rank"""

T = TypeVar("T")


class RunStopped(Exception):
    """A run that cannot continue. The message is one line that says where, why, and from where to resume."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    distributed: bool
    """True under torchrun, also with a single rank"""
    store: dist.Store | None = None
    """shared by the ranks, to be read and written at any time; None for one process"""
    timeout_s: int = TIMEOUT_S
    restarts: int = 0
    """how often torchrun has restarted the ranks, after one of them failed"""
    max_restarts: int = 0
    """how often it would at most"""
    torchrun_id: str = ""
    """which torchrun started this rank; a restart of the ranks does not change it"""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name as CUDA gives it, or the kind of device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def start(device: str = "", zero_stage: int = 0, timeout_s: int = TIMEOUT_S) -> World:
    """Find the device and, under torchrun, join the process group: NCCL on GPUs, gloo elsewhere.

    Args:
        device: "cuda", "cuda:1", "mps", "cpu", or "" for the first kind that is there.
        zero_stage: what will be sharded; anything above 0 needs torchrun.
        timeout_s: how long a rank waits for the others before it gives up.

    Raises:
        BadInput: no such device here, a ZeRO stage without torchrun, or a part of torchrun's variables.
        RunStopped: a rank did not start in time.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, index = device.partition(":")
    if kind and kind not in DEVICES:
        raise BadInput(f"--device {device} is unknown; choose cuda, mps or cpu, or leave it out")
    kind = kind or next(name for name in DEVICES if available[name])
    if not available[kind]:
        here = ", ".join(name for name in DEVICES if available[name])
        raise BadInput(f"--device {device}: there is none here; leave the flag out, or choose from: {here}")
    is_number = index.isascii() and index.isdecimal() and len(index) < 10
    if index and not (kind == "cuda" and is_number and int(index) < torch.cuda.device_count()):
        raise BadInput(f"--device {device}: there is no such device here; leave the number out")

    number = int(index or 0)

    rank, local_rank, size = (_of_environment(*given) for given in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    distributed = bool(os.environ.get("LOCAL_RANK")) or size > 1
    missing = [name for name in OF_A_RANK if not os.environ.get(name)]
    if distributed and missing:
        raise BadInput(f"the environment is that of a rank, without {', '.join(missing)}; start ranks with torchrun")
    if zero_stage and not distributed:
        raise BadInput(
            f"--zero_stage {zero_stage} shards over ranks: start it as torchrun --nproc_per_node GPUS train.py ..., "
            "or use --zero_stage 0"
        )
    if not distributed:
        rank, local_rank, size = 0, 0, 1
    elif not (rank < size and local_rank < size and 0 <= _of_environment("MASTER_PORT", 0) < 2**16):
        told = " ".join(f"{name}={os.environ[name]}" for name in OF_A_RANK)
        raise BadInput(f"the environment is that of no rank: {told}; start ranks with torchrun")
    if distributed and kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f"--nproc_per_node asks for more ranks than the {torch.cuda.device_count()} GPUs here")
        number = local_rank
    chosen = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    restarts, max_restarts = (_of_environment(f"TORCHELASTIC_{n}", 0) for n in ("RESTART_COUNT", "MAX_RESTARTS"))
    store = None
    if distributed:
        timeout = timedelta(seconds=timeout_s)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            # torchrun's store outlives the ranks: without a prefix, they would read what ranks before a restart wrote.
            store = dist.PrefixStore(f"attempt_{restarts}", store)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=chosen if kind == "cuda" else None,
            )
        except RuntimeError as error:
            raise RunStopped(
                f"rank {rank} waited for all {size} ranks to start, and not all came: {' '.join(str(error).split())}"
            ) from error
    torchrun_id = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {socket.gethostname()} {os.getppid()}"
    return World(rank, local_rank, size, chosen, distributed, store, timeout_s, restarts, max_restarts, torchrun_id)


def _of_environment(name: str, default: int) -> int:
    """A count from torchrun's variables; the default if it is missing or empty.

    Raises:
        BadInput: it is not a count.
    """
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise BadInput(f"the environment has {name}={text}, which is no count; start ranks with torchrun, or unset it")
    return int(text)


def stop(world: World) -> None:
    """Leave the process group."""
    if world.distributed:
        dist.destroy_process_group()


def wait_for_device(world: World) -> None:
    """Wait until the GPU is idle."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.distributed:
        dist.barrier()


def on_main(world: World, function: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result on every rank.

    Raises:
        BadInput: the function raised it; on every rank, so that none waits for one that has ended.
    """
    if not world.distributed:
        return function()
    outcome: list = [None]
    if world.is_main:
        try:
            outcome = [function()]
        except BadInput as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], BadInput):
        raise outcome[0]
    return outcome[0]


def gather(world: World, value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank."""
    if not world.distributed:
        return [value]
    values: list = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def parallelize(gpt: GPT, world: World, zero_stage: int, dtype: str, compile: bool) -> tuple[torch.nn.Module, ...]:
    """Parallelize a network over the ranks.

    Args:
        gpt: on the device; sharded in place at stages 2 and 3 (ZeRO, https://arxiv.org/abs/1910.02054).
        world: the ranks.
        zero_stage: 0 and 1, DistributedDataParallel; 2, FSDP2 that keeps parameters between forward and backward; 3,
            FSDP2 that frees them.
        dtype: of the matmuls.
        compile: with torch.compile.

    Returns:
        (the network whose backward averages gradients over the ranks, the network for forward passes alone)
    """
    if zero_stage >= 2:
        shard(gpt, zero_stage, dtype, compile)
        return gpt, gpt
    network: Any = torch.compile(gpt, fullgraph=True) if compile else gpt
    if not world.distributed:
        return network, network
    device_ids = [world.local_rank] if world.device.type == "cuda" else None
    # Gradients are views of the buckets that are reduced, which saves a copy.
    return DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True), network


def shard(gpt: GPT, zero_stage: int, dtype: str, compile: bool) -> None:
    """Apply FSDP2. The unit is a block: its matrices and their biases are gathered and freed together.

    What autocast computes in fp32 stays in fp32: LayerNorms and embeddings belong to the root, with the tied matrix,
    which autocast casts for the logits as it does without sharding. A block's matrices are gathered in `dtype`, as
    autocast would cast them, and gradients are reduced in fp32.
    """
    low = None if dtype == "float32" else getattr(torch, dtype)
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    frees = zero_stage == 3
    for block in gpt.transformer.h:
        if compile:  # inside the hooks that gather and free, which torch.compile cannot trace
            for part in (block.attn, block.mlp):
                part.forward = torch.compile(part.forward, fullgraph=True)  # type: ignore[method-assign]
        fully_shard([block.attn, block.mlp], reshard_after_forward=frees, mp_policy=policy)
    root_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(gpt, reshard_after_forward=frees, mp_policy=root_policy)
    # It warns against changing a view in place, which nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def warm_up_ddp(model: torch.nn.Module, world: World, shape: tuple[int, int], autocast: torch.autocast) -> None:
    """Run one throw-away step so that DDP settles its buckets now; otherwise a resumed run would sum gradients in
    another order than an uninterrupted one.

    DDP rebuilds its buckets after its first backward pass, and with more than two ranks the place of a gradient in its
    bucket decides the order of its sum.

    Args:
        model: from `parallelize`; without DDP nothing happens.
        world: the ranks.
        shape: (B, T) of the batches to come, so that nothing is compiled for another.
        autocast: the context of forward passes.
    """
    if isinstance(model, DistributedDataParallel) and world.size > 2:
        idx = torch.zeros(shape, dtype=torch.int64, device=world.device)
        with autocast:
            _, loss = model(idx, idx, return_logits=False)
        loss.backward()
        model.zero_grad(set_to_none=True)


def synchronise_gradients(model: torch.nn.Module, now: bool, zero_stage: int) -> None:
    """Set whether the next forward and backward average the gradients or accumulate them on each rank."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        # Parameters do not change before the update, so stage 2 gathers them once for all micro-steps.
        model.set_reshard_after_backward(now or zero_stage == 3)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, put together. Every rank has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FullWeights(Mapping[str, torch.Tensor]):
    """Parameters by name. Each is put together from its shards when it is looked up, so that there is one full copy at
    a time. Every rank has to look up the same names in the same order."""

    def __init__(self, params: Mapping[str, torch.Tensor]):
        self.params = params

    def __getitem__(self, name: str) -> torch.Tensor:
        return full(self.params[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


def mean(values: torch.Tensor, world: World) -> torch.Tensor:
    """The mean over the ranks of a small tensor on the device, bitwise identical on every rank."""
    if world.distributed:
        values = values.clone()
        dist.all_reduce(values)
        values /= world.size
    return values


class StopRequest:
    """Signals that ask the run to end after the current step.

    Ctrl-C (SIGINT) interrupts; a second one ends the process at once. SIGTERM and SIGUSR1, which schedulers send before
    they take the machine away, and SIGHUP, which a closing terminal sends, preempt: the run saves first.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.preempted = False

    def install(self) -> "StopRequest":
        """Listen from now on."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        for name in ("SIGTERM", "SIGUSR1", "SIGHUP"):  # Windows has only the first
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_preemption)
        return self

    def _on_interrupt(self, signum: int, frame: object) -> None:
        if self.interrupted:  # an exception would wait for the thread that saves
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.interrupted = True

    def _on_preemption(self, signum: int, frame: object) -> None:
        self.preempted = True
