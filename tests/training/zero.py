"""`python -m tests.training.zero`: bytes per rank at each ZeRO stage, measured, beside the paper's formula.

One process plays each rank in turn, in a process group that computes nothing (torch's "fake" backend): it allocates,
shards and frees exactly what that rank would, so that 8 ranks of a network fit where one does. Everything is fp32, and
each kind is measured when all of it is there: parameters at the end of a forward pass, gradients at the end of the
backward pass, AdamW's moments after the update.

Rajbhandari et al. 2019 (https://arxiv.org/abs/1910.02054), section 5, for Ψ parameters on N ranks, with 4 bytes per
parameter and gradient and K = 8 for two moments: (4 + 4 + K)Ψ, then 4Ψ + 4Ψ + KΨ/N, 4Ψ + (4 + K)Ψ/N and
(4 + 4 + K)Ψ/N. At stage 2, FSDP2 keeps the parameters in use beside the shard that AdamW updates, which is the paper's
fp32 master copy, and so K = 12 there.
"""

import argparse
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.tables import table
from model.gpt import GPT, PRESETS, GPTConfig
from training import distributed, optim
from training.config import Config
from training.distributed import World

RANKS = (1, 2, 4, 8)
TOKENS = (1, 64)


class Held(NamedTuple):
    """Bytes on one rank."""

    parameters: int
    """the forward pass's, and at stage 2 the shards beside them"""
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


def formula(n_params: int, zero_stage: int, ranks: int) -> float:
    """The paper's bytes per rank; see the module."""
    whole, sharded = {0: (16, 0), 1: (8, 8), 2: (4, 16), 3: (0, 16)}[zero_stage]
    return n_params * (whole + sharded / ranks)


def held(config: GPTConfig, zero_stage: int, rank: int, ranks: int) -> Held:
    """Make one update as a rank of many, and measure."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        gpt = GPT(config, init=False)
        params = dict(gpt.named_parameters())
        with torch.no_grad():
            for p in params.values():
                p.zero_()
        world = World(rank, rank, ranks, torch.device("cpu"), distributed=True)
        model, _ = distributed.parallelize(gpt, world, zero_stage, "float32", compile=False)
        if zero_stage < 2:  # DDP asks for the result of its reduction, which the fake group does not give
            model.register_comm_hook([], unreduced)  # type: ignore[operator]
        params = dict(gpt.named_parameters())
        optimizer = optim.build(gpt, Config(learning_rate=0.0, zero_stage=zero_stage))
        idx = torch.zeros(TOKENS, dtype=torch.int64)
        _, loss = model(idx, idx, return_logits=False)
        in_use = _bytes([*params.values(), *gpt.parameters()])
        loss.backward()
        gradients = _bytes(p.grad for p in params.values() if p.grad is not None)
        optimizer.step()
        state = optim.adamw_state(optimizer)
        moments = _bytes(kind[name] for kind in state.values() for name in ("exp_avg", "exp_avg_sq"))
        return Held(in_use, gradients, moments)
    finally:
        dist.destroy_process_group()


def unreduced(seen: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Note a bucket of gradients, and leave it as it is."""
    seen.append(bucket.index())
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages behind tensors, or behind this rank's shards of them; each once."""
    local = [tensor.to_local() if isinstance(tensor, distributed.DTensor) else tensor for tensor in tensors]
    storages = [tensor.detach().untyped_storage() for tensor in local]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser("python -m tests.training.zero", description="Bytes per rank by ZeRO stage.")
    parser.add_argument("--model", default="d12", choices=PRESETS, help="A preset (default: d12).")
    args = parser.parse_args()
    print(f"{args.model}, fp32, MiB per rank: the mean of all ranks, by kind and in all, and the largest\n")
    head = ("stage", "ranks", "parameters", "gradients", "moments", "mean", "most", "formula", "mean/f.", "most/f.")
    lines = []
    config = PRESETS[args.model]
    for stage, n in itertools.product(range(4), RANKS):
        ranks, paper = [held(config, stage, rank, n) for rank in range(n)], formula(config.num_params(), stage, n)
        kinds = [sum(kind) / n for kind in zip(*ranks, strict=True)]
        mean, most = sum(kinds), max(held.total for held in ranks)
        sizes = [f"{size / 2**20:,.1f}" for size in (*kinds, mean, most, paper)]
        lines.append((stage, n, *sizes, f"{mean / paper:.3f}", f"{most / paper:.3f}"))
    print(table(head, lines))


if __name__ == "__main__":
    main()
