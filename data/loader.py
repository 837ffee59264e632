"""The loader: which tokens each rank reads from the shards, and in which order."""

import hashlib

import numpy as np
import torch

from common import BadInput
from data.shards import find_shards, open_shard

END = 1024
"""tokens at each end of a shard that identify it in a saved position"""
IN_USE = 8
"""most shards mapped at a time, more than are read alternately; each is an open file"""
SCAN_BLOCK = 1 << 22
"""tokens checked at a time for ids that are too large"""


class ShardLoader:
    """Micro-batches from the shards that match a glob, in an endless cycle.

    In order, as in llm.c: all ranks are in the same shard at the same base. Rank r reads B·T + 1 tokens at
    base + r·B·T; then base advances by ranks·B·T. If the next window of all ranks would pass the end of the shard, all
    ranks move to the next. So up to ranks·B·T tokens at the end of each shard are not read, and changing the number of
    ranks slightly moves the point where each shard ends.

    Shuffled: the unit is one sequence, the T + 1 tokens at a multiple of T in a shard. In every epoch the order of the
    shards is drawn from (seed, epoch), and that of each shard's sequences from (seed, epoch, shard). All ranks together
    read this one stream, B sequences per rank in turn, across the ends of shards and epochs: for any number of ranks,
    each sequence is read once per epoch.

    Args:
        pattern: glob of shards, which are sorted.
        batch_size: B, sequences per rank.
        sequence_length: T, tokens per sequence.
        rank: this rank.
        world_size: number of ranks.
        device: device of the batches. On CUDA the next batch is copied during computation with the current one.
        vocab_size: ids have to be below it; each shard is checked when it is first opened.
        shuffle_seed: seed for the order of shards and sequences; None for the order on disk.

    Raises:
        BadInput: no file matches; a file is not a shard, is too small for one window, or has too large an id.
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
        shuffle_seed: int | None = None,
    ):
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.shuffle_seed = shuffle_seed
        self.files = find_shards(pattern)
        self._lengths, self._ends, digest = [], [], hashlib.sha256()
        for path in self.files:
            tokens = open_shard(path)
            self._lengths.append(len(tokens))
            ends = tokens[:END].tobytes() + tokens[-END:].tobytes()
            self._ends.append(hashlib.sha256(ends).digest())
            digest.update(ends)
        self._digest = digest.hexdigest()
        self.total_tokens = sum(self._lengths)
        needed, unit = self._stride + 1, "ranks * batch_size * sequence_length"
        if self._shuffled:
            needed, unit = sequence_length + 1, "sequence_length"
        for path, length in zip(self.files, self._lengths, strict=True):
            if length < needed:
                raise BadInput(
                    f"{path}: {length} tokens are fewer than the {needed} = {unit} + 1 that a step reads; use larger "
                    "shards, or a smaller --batch_size or --sequence_length"
                )
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ahead: tuple[torch.Tensor, torch.Tensor] | None = None  # the batch that is being copied to the GPU
        self._after_ahead: tuple[int, ...]  # the position after it
        self._mapped: dict[int, np.ndarray] = {}  # tokens of the open shards
        self._scanned: set[int] = set()  # shards whose ids were checked
        self._permutations: dict[tuple[int, int], np.ndarray] = {}
        self._sequences = np.array([(length - 1) // sequence_length for length in self._lengths])
        self.reset()
        self._open(int(self._order(0)[0]))

    def repeated(self, other: "ShardLoader | None" = None) -> str | None:
        """A warning that names repeated shards, or None: repeated within this loader, or shared with `other`.

        Two shards are the same if they have the same length and the same tokens at both ends. This also finds links and
        copies.
        """
        what = "are in --input_bin and in --input_val_bin: the validation loss is of tokens that are trained on"
        if other is None:
            what = "have the same tokens as shards before them, and are read as well"
        known = set(zip(other._lengths, other._ends, strict=True)) if other else set()
        files = []
        for file, shard in zip(self.files, zip(self._lengths, self._ends, strict=True), strict=True):
            if shard in known:
                files.append(file)
            if other is None:
                known.add(shard)
        if not files:
            return None
        return f"{', '.join(files[:3])}{f' and {len(files) - 3} more' if files[3:] else ''} {what}"

    @property
    def _stride(self) -> int:
        return self.world_size * self.batch_size * self.sequence_length

    def reset(self) -> None:
        """Return to the first token of the first shard or, if shuffled, to the first sequence of the first epoch."""
        self._ahead = None
        self._go_to((0,) if self._shuffled else (0, 0))

    def state_dict(self) -> dict:
        """The position of the next batch, the same on every rank: shard and token in it or, if shuffled, the number of
        sequences that all ranks together have read."""
        names = ("sequence",) if self._shuffled else ("shard", "base")
        shards = {"lengths": list(self._lengths), "digest": self._digest}
        return dict(zip(names, self._position, strict=True)) | shards

    def load_state_dict(self, state: dict) -> None:
        """Go to a position from `state_dict`.

        Raises:
            BadInput: it is a position in other shards, or in another order.
        """
        if list(state["lengths"]) != self._lengths:
            raise BadInput(
                f"the saved position is of {len(state['lengths'])} shards with {sum(state['lengths'])} tokens, and "
                f"--input_bin has {len(self.files)} with {self.total_tokens}; name the shards that were trained on"
            )
        if state.get("digest", self._digest) != self._digest:  # the first checkpoints have none
            raise BadInput(
                "the saved position is of shards of the same lengths with other tokens than --input_bin has; name the "
                "shards that were trained on"
            )
        if self._shuffled != ("sequence" in state):
            raise BadInput(f"the saved position is of --shuffle {int(not self._shuffled)}; give that")
        self._ahead = None
        self._go_to((state["sequence"],) if self._shuffled else (state["shard"], state["base"]))

    def where(self) -> str:
        """Where the next batch is read, in words."""
        if not self._shuffled:
            return f"{self.files[self._position[0]]} from token {self._position[1]}"
        shard, index = self._locate(self._position[0])
        epoch = self._position[0] // int(self._sequences.sum())
        return f"{self.files[shard]} from sequence {index} in the order of epoch {epoch}"

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next inputs and targets of this rank, each (B, T) int64 on the device.

        Raises:
            BadInput: the next shard has an id at or above vocab_size. All ranks raise this at the same batch.
        """
        if self._copy_stream is None:
            return self._advance()
        x, y = self._ahead or self._copy_ahead()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copy_stream)
        for tensor in (x, y):
            tensor.record_stream(current)
        self._position = self._after_ahead
        self._ahead = self._copy_ahead()
        return x, y

    @property
    def _shuffled(self) -> bool:
        return self.shuffle_seed is not None

    def _go_to(self, position: tuple[int, ...]) -> None:
        """Set the position. In order, move to the next shard if no window fits after it."""
        if not self._shuffled:
            shard, base = position
            if base + self._stride + 1 > self._lengths[shard]:
                position = (shard + 1) % len(self.files), 0
        self._position = position

    def _advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read this rank's windows at the position, on the CPU, and advance the position."""
        B, T = self.batch_size, self.sequence_length
        if self._shuffled:
            (first,) = self._position
            # Every rank opens the shards of all ranks, so that all refuse a bad shard at the same batch.
            located = [self._locate(first + i) for i in range(self.world_size * B)]
            tokens = {shard: self._open(shard) for shard, _ in located}
            mine = located[self.rank * B : (self.rank + 1) * B]
            windows = torch.from_numpy(
                np.stack([tokens[shard][i * T : (i + 1) * T + 1] for shard, i in mine]).astype(np.int64)
            )
            self._go_to((first + self.world_size * B,))
            return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        shard, base = self._position
        first = base + self.rank * B * T
        window = torch.from_numpy(self._open(shard)[first : first + B * T + 1].astype(np.int64))
        self._go_to((shard, base + self._stride))
        return window[:-1].view(B, T), window[1:].view(B, T)

    def _locate(self, sequence: int) -> tuple[int, int]:
        """Shard, and index in it, of a sequence in the shuffled stream."""
        epoch, number = divmod(sequence, int(self._sequences.sum()))
        order = self._order(epoch)
        ends = np.cumsum(self._sequences[order])
        turn = int(np.searchsorted(ends, number, side="right"))
        shard = int(order[turn])
        within = number - int(ends[turn]) + int(self._sequences[shard])
        return shard, int(self._order_within(epoch, shard)[within])

    def _order(self, epoch: int) -> np.ndarray:
        """Order of the shards in an epoch."""
        return self._permutation(epoch, -1, len(self.files)) if self._shuffled else np.arange(len(self.files))

    def _order_within(self, epoch: int, shard: int) -> np.ndarray:
        """Order of the sequences of a shard in an epoch."""
        return self._permutation(epoch, shard, int(self._sequences[shard]))

    def _permutation(self, epoch: int, shard: int, length: int) -> np.ndarray:
        """A permutation drawn from (seed, epoch, shard); -1 for the order of the shards.

        Uses numpy's RandomState, whose numbers never change between versions, so that a run can resume after an
        upgrade.
        """
        key = (epoch, shard)
        if key not in self._permutations:
            if len(self._permutations) > IN_USE:
                self._permutations.clear()
            assert self.shuffle_seed is not None
            random = np.random.RandomState([self.shuffle_seed, epoch, shard + 1])
            self._permutations[key] = random.permutation(length)
        return self._permutations[key]

    def _copy_ahead(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Start copying the next batch to the GPU, without changing the position."""
        before = self._position
        x, y = (tensor.pin_memory() for tensor in self._advance())
        self._after_ahead = self._position
        self._position = before
        with torch.cuda.stream(self._copy_stream):
            return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _open(self, shard: int) -> np.ndarray:
        """The tokens of a shard. Checks its ids the first time."""
        if shard not in self._mapped:
            tokens = open_shard(self.files[shard])
            if shard not in self._scanned:
                self._scan(shard, tokens)
                self._scanned.add(shard)
            if len(self._mapped) > IN_USE:
                self._mapped.clear()
            self._mapped[shard] = tokens
        return self._mapped[shard]

    def _scan(self, shard: int, tokens: np.ndarray) -> None:
        """Refuse ids at or above vocab_size."""
        for start in range(0, len(tokens), SCAN_BLOCK):
            block = tokens[start : start + SCAN_BLOCK]
            if block.max() >= self.vocab_size:
                at = start + int(np.argmax(block >= self.vocab_size))
                raise BadInput(
                    f"{self.files[shard]}: token {at} has the id {tokens[at]}, and the model knows "
                    f"{self.vocab_size} ids; train on shards of the model's own tokenizer"
                )
