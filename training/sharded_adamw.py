"""ZeRO stage 1: the optimizer's state is sharded, all else is replicated (Rajbhandari et al. 2019,
https://arxiv.org/abs/1910.02054)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

BUCKET_BYTES = 2**25
"""of updated weights in one message; a larger tensor is sent alone"""


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW with the moments of its own rows on each rank, for gradients that are averaged on all ranks.

    Every tensor is split along its first dimension as FSDP2 does. A rank updates its rows in place and sends them to
    the others. torch's ZeroRedundancyOptimizer assigns whole tensors to ranks instead, and sends each by itself: of
    eight ranks, the one with GPT-2's token embedding then holds a sixth more than the paper says.

    Args:
        groups: parameter groups as torch's AdamW takes them; contiguous tensors on one device.
        options: for AdamW.
    """

    def __init__(self, groups: Iterable[dict], **options: Any):
        super().__init__(groups, options)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        params = [p for group in self.param_groups for p in group["params"]]
        self.own = {p: _rows(p.detach(), self.rank, self.size) for p in params}
        groups = [group | {"params": [self.own[p] for p in group["params"]]} for group in self.param_groups]
        self.adamw = torch.optim.AdamW(groups, **options)
        self.buckets = [
            [[_rows(p.detach(), rank, self.size).view(-1) for p in bucket] for rank in range(self.size)]
            for bucket in _buckets(params)
        ]
        self.mesh = init_device_mesh(params[0].device.type, (self.size,))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody gives one
        """Update the weights on all ranks. Every rank has to call this."""
        for group, own in zip(self.param_groups, self.adamw.param_groups, strict=True):
            own["lr"] = group["lr"]
            for p in group["params"]:
                self.own[p].grad = _rows(p.grad, self.rank, self.size)
        self.adamw.step()
        self.adamw.zero_grad()
        for shares in self.buckets:
            self._exchange(shares)

    def _exchange(self, shares: list[list[torch.Tensor]]) -> None:
        """Send this rank's rows of some tensors, and receive those of the others in place.

        Args:
            shares: by rank, its rows of each of these tensors, as vectors; no rank has more than the first.
        """
        longest = sum(map(len, shares[0]))
        mine = torch.cat(shares[self.rank])
        sent = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        received = sent.new_empty(self.size, longest)
        dist.all_gather(list(received), sent)
        for rank, share in enumerate(shares):
            if rank != self.rank:
                lengths = [len(rows) for rows in share]
                torch._foreach_copy_(share, received[rank, : sum(lengths)].split(lengths))

    def sharded_state(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """AdamW's state by parameter: its step, and its moments as this rank's shards of tensors of the same shape."""

        def shard(p: torch.Tensor, rows: torch.Tensor) -> DTensor:
            return DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())

        return {
            p: {kind: value if kind == "step" else shard(p, value) for kind, value in self.adamw.state[own].items()}
            for p, own in self.own.items()
        }


def _rows(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's rows: the same number on every rank, except that the last ranks may have fewer, or none."""
    length = -(-len(tensor) // size)
    return tensor[rank * length : (rank + 1) * length]


def _buckets(params: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors whose rows are sent together."""
    bucket: list[torch.Tensor] = []
    for p in params:
        if bucket and sum(q.nbytes for q in (*bucket, p)) > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(p)
    yield bucket
