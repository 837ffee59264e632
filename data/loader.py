"""The loader: what each rank reads from the shards, and in which order."""

import numpy as np
import torch

from common import BadInput
from data.shards import find_shards, open_shard

SCAN_BLOCK = 1 << 22
"""tokens looked at in one go for ids that are too large"""


class ShardLoader:
    """Micro-batches from the shards that match a glob, round and round.

    All ranks are in the same shard at the same base. Rank r reads B·T + 1 tokens at base + r·B·T; then base advances by
    ranks·B·T. Where the next window of all ranks would pass the end of the shard, all go on to the next.

    Args:
        pattern: glob of shards; they are read in sorted order.
        batch_size: B, sequences a rank.
        sequence_length: T, tokens a sequence.
        rank: this rank.
        world_size: number of ranks.
        device: where the batches are put. On CUDA the next batch travels while the last one is computed with.
        vocab_size: every id must be below it; each shard is looked through when it is opened.

    Raises:
        BadInput: no file matches; a file is no shard, is too small for one window, or has too large an id.
    """

    def __init__(
        self,
        pattern: str,
        batch_size: int,
        sequence_length: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        vocab_size: int = 50257,
    ):
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.files = find_shards(pattern)
        self._lengths = [len(open_shard(path)) for path in self.files]
        self.total_tokens = sum(self._lengths)
        needed = self._stride + 1
        for path, length in zip(self.files, self._lengths, strict=True):
            if length < needed:
                raise BadInput(
                    f"{path}: {length} tokens are fewer than the {needed} = ranks * batch_size * sequence_length + 1 "
                    "that a step reads; use larger shards, or a smaller --batch_size or --sequence_length"
                )
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ahead = None  # the batch that is on its way to the GPU
        self._opened: int | None = None  # the shard that is mapped
        self.reset()
        self._open(0)

    @property
    def _stride(self) -> int:
        return self.world_size * self.batch_size * self.sequence_length

    def reset(self) -> None:
        """Go back to the first token of the first shard."""
        self._ahead = None
        self._go_to(shard=0, base=0)

    def state_dict(self) -> dict:
        """The position of the next batch. It is the same on every rank."""
        return {"shard": self._shard, "base": self._base, "lengths": list(self._lengths)}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position that `state_dict` gave.

        Raises:
            BadInput: it speaks of other shards.
        """
        if list(state["lengths"]) != self._lengths:
            raise BadInput(
                f"the saved position is of {len(state['lengths'])} shards with {sum(state['lengths'])} tokens, and "
                f"--input_bin has {len(self.files)} with {self.total_tokens}; name the shards that were trained on"
            )
        self._ahead = None
        self._go_to(state["shard"], state["base"])

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next inputs and targets of this rank, each (B, T) int64 on the device.

        Raises:
            BadInput: the next shard has an id at or above vocab_size.
        """
        if self._copy_stream is None:
            return self._advance()
        x, y = self._ahead or self._copy_ahead()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copy_stream)
        for tensor in (x, y):
            tensor.record_stream(current)
        self._shard, self._base = self._after_ahead
        self._ahead = self._copy_ahead()
        return x, y

    def _go_to(self, shard: int, base: int) -> None:
        """Make (shard, base) the position, or the start of the next shard where no window fits behind base."""
        if base + self._stride + 1 > self._lengths[shard]:
            shard, base = (shard + 1) % len(self.files), 0
        self._shard, self._base = shard, base

    def _advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read this rank's window at the position, on the CPU, and move the position on."""
        self._open(self._shard)
        B, T = self.batch_size, self.sequence_length
        first = self._base + self.rank * B * T
        window = torch.from_numpy(self._tokens[first : first + B * T + 1].astype(np.int64))
        self._go_to(self._shard, self._base + self._stride)
        return window[:-1].view(B, T), window[1:].view(B, T)

    def _copy_ahead(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Start copying the next batch to the GPU; the position that others see stays before it."""
        before = self._shard, self._base
        x, y = (tensor.pin_memory() for tensor in self._advance())
        self._after_ahead = self._shard, self._base
        self._shard, self._base = before
        with torch.cuda.stream(self._copy_stream):
            return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _open(self, shard: int) -> None:
        """Map a shard and look through its ids, unless it is open."""
        if shard == self._opened:
            return
        self._tokens = open_shard(self.files[shard])
        for start in range(0, len(self._tokens), SCAN_BLOCK):
            block = self._tokens[start : start + SCAN_BLOCK]
            if block.max() >= self.vocab_size:
                at = start + int(np.argmax(block >= self.vocab_size))
                raise BadInput(
                    f"{self.files[shard]}: token {at} has the id {self._tokens[at]}, and the model knows "
                    f"{self.vocab_size} ids; train on shards of the model's own tokenizer"
                )
        self._opened = shard
