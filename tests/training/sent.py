"""What ranks of a small network send per update, counted. This is the program of each rank: it joins the others over
gloo and makes updates at every ZeRO stage as train.py does; rank 0 prints the counts of all ranks as JSON.

The last update is counted twice. `Handed` sees the tensors that the rank hands to collectives. `on_the_wire` asks Linux
how many bytes the process has sent over TCP, which also depends on gloo's algorithms: it makes all-reduces and
all-gathers on a ring, and a reduce-scatter out of an all-reduce.
"""

import json
import os
import socket
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.gpt import GPT, GPTConfig
from tests.training import ranks
from training import distributed, optim
from training.config import Config
from training.distributed import World
from training.step import autocast_to, clip, forward_backward

SMALL = GPTConfig(block_size=64, vocab_size=1009, n_layer=3, n_head=4, n_embd=64)
STAGES = (0, 1, 2, 3)
MICRO_STEPS = 2
BATCH = (1, 16)

WIRE = "on the wire"
COLLECTIVES = {  # what it is called here, and which of its arguments is the whole tensor
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
}
BYTES_SENT = 200
"""where `struct tcp_info` (linux/tcp.h) has tcpi_bytes_sent; tcpi_bytes_retrans follows. Since Linux 4.19."""


class Handed(TorchDispatchMode):
    """Adds up the bytes that this rank hands to each kind of collective: those of the whole tensor, which goes into a
    reduction or comes out of a gather. It does not see inside DTensor, which reduces the 4 bytes of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            kind, index = COLLECTIVES[func._schema.name]
            self.bytes[kind] += sum(tensor.nbytes for tensor in tree_leaves(args[index]))
        return func(*args, **(kwargs or {}))


def on_the_wire() -> int:
    """Bytes that this process has sent over the TCP connections that it has open, without what was sent again."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(descriptor)))
        except OSError:  # no socket, or closed since it was listed
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 16)
                sent, again = struct.unpack_from("=QQ", info, BYTES_SENT)
                total += sent - again
    return total


def count(world: World, zero_stage: int) -> dict[str, int]:
    """Bytes of one update at a stage, with bfloat16 autocast: by kind of collective, and on the wire."""
    gpt = GPT(SMALL)
    model, _ = distributed.parallelize(gpt, world, zero_stage, "bfloat16", compile=False)
    params = list(gpt.parameters())
    optimizer = optim.build(gpt, Config(learning_rate=1e-3, zero_stage=zero_stage))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast, idx = autocast_to(torch.bfloat16, world.device), torch.zeros(BATCH, dtype=torch.int64)

    def update() -> None:
        loss = forward_backward(model, [(idx, idx)] * MICRO_STEPS, MICRO_STEPS, autocast, scaler, zero_stage)
        norm = clip(params, optimizer, scaler, 1.0)
        distributed.mean(torch.stack([loss, norm, loss, norm]), world)  # as many numbers as the loop of train.py
        optim.update(optimizer, scaler, accepted=True)

    for _ in range(2):  # in the second, ranks agree on DDP's final buckets
        update()
    distributed.barrier(world)
    before = on_the_wire()
    with Handed() as handed:
        update()
    distributed.barrier(world)  # whatever belongs to the update has been sent
    return {**handed.bytes, WIRE: on_the_wire() - before}


def main(argv: list[str]) -> int:
    """The program of a rank; see the module."""
    world = distributed.start("cpu")
    counts = distributed.gather(world, [count(world, stage) for stage in STAGES])
    if world.is_main:
        print(json.dumps(counts))
    distributed.stop(world)
    return 0


def count_on(n_ranks: int, folder: Path) -> list[list[dict[str, int]]]:
    """Start so many ranks, which print into a folder. Returns the counts of each rank, by stage."""
    started = ranks.start(n_ranks, [], folder, program="tests.training.sent")
    statuses = started.wait()
    assert set(statuses) == {0}, started.errors
    return json.loads(started.screen)
