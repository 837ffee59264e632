"""The loader: what each rank reads from the shards, and in which order."""

import hashlib

import numpy as np
import torch

from common import BadInput
from data.shards import find_shards, open_shard

END = 1024
"""tokens at both ends of a shard, by which a saved position knows it"""
IN_USE = 8
"""shards at a time, and more than are ever read from in a row; each that is mapped is an open file"""
SCAN_BLOCK = 1 << 22
"""tokens looked at in one go for ids that are too large"""


class ShardLoader:
    """Micro-batches from the shards that match a glob, round and round.

    In order, as llm.c: all ranks are in the same shard at the same base. Rank r reads B·T + 1 tokens at base + r·B·T;
    then base advances by ranks·B·T. Where the next window of all ranks would pass the end of the shard, all go on to
    the next. The tokens that are left at the end of a shard are therefore up to ranks·B·T; with another number of ranks
    a run reads the same tokens in the same order, and turns to the next shard a little earlier or later.

    Shuffled: the unit is one sequence, the T + 1 tokens at a multiple of T in a shard. In every epoch the shards come
    in an order drawn from (seed, epoch), and the sequences of each in an order drawn from (seed, epoch, shard). All
    ranks together read this one stream, B sequences a rank in turn, across the ends of shards and epochs: whatever the
    number of ranks, each sequence is read once an epoch.

    Args:
        pattern: glob of shards; they are read in sorted order.
        batch_size: B, sequences a rank.
        sequence_length: T, tokens a sequence.
        rank: this rank.
        world_size: number of ranks.
        device: where the batches are put. On CUDA the next batch travels while the last one is computed with.
        vocab_size: every id must be below it; each shard is looked through when it is opened.
        shuffle_seed: draws the order of shards and sequences; None for the order on disk.

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
        self._mapped: dict[int, np.ndarray] = {}  # the tokens of the shards that are read from
        self._scanned: set[int] = set()  # those whose ids were looked through
        self._permutations: dict[tuple[int, int], np.ndarray] = {}
        self._sequences = np.array([(length - 1) // sequence_length for length in self._lengths])
        self.reset()
        self._open(int(self._order(0)[0]))

    def repeated(self, other: "ShardLoader | None" = None) -> str | None:
        """Which shards are there twice, in one line: in this loader alone, or here and in `other` too.

        Two shards are the same if they have the same length and the same tokens at both ends, so that links and copies
        are found as well as a file that two globs match.
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
        """Go back to the first token of the first shard; shuffled, to the first sequence of the first epoch."""
        self._ahead = None
        self._go_to((0,) if self._shuffled else (0, 0))

    def state_dict(self) -> dict:
        """The position of the next batch, the same on every rank: the shard and the token in it; shuffled, the number
        of sequences that were read so far by all ranks together."""
        names = ("sequence",) if self._shuffled else ("shard", "base")
        shards = {"lengths": list(self._lengths), "digest": self._digest}
        return dict(zip(names, self._position, strict=True)) | shards

    def load_state_dict(self, state: dict) -> None:
        """Go to a position that `state_dict` gave.

        Raises:
            BadInput: it speaks of other shards, or of another order.
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
        """What the next batch is read from, in words."""
        if not self._shuffled:
            return f"{self.files[self._position[0]]} from token {self._position[1]}"
        shard, index = self._locate(self._position[0])
        epoch = self._position[0] // int(self._sequences.sum())
        return f"{self.files[shard]} from sequence {index} in the order of epoch {epoch}"

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next inputs and targets of this rank, each (B, T) int64 on the device.

        Raises:
            BadInput: the next shard has an id at or above vocab_size. All ranks raise it at the same batch.
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
        """Make this the position; in the order on disk, the start of the next shard where no window fits behind it."""
        if not self._shuffled:
            shard, base = position
            if base + self._stride + 1 > self._lengths[shard]:
                position = (shard + 1) % len(self.files), 0
        self._position = position

    def _advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read this rank's windows at the position, on the CPU, and move the position on."""
        B, T = self.batch_size, self.sequence_length
        if self._shuffled:
            (first,) = self._position
            # Every rank opens what any rank reads, so that all of them refuse a bad shard at the same batch.
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
        """Where the sequence of this number in the shuffled stream is: its shard, and its index there."""
        epoch, number = divmod(sequence, int(self._sequences.sum()))
        order = self._order(epoch)
        ends = np.cumsum(self._sequences[order])
        turn = int(np.searchsorted(ends, number, side="right"))
        shard = int(order[turn])
        within = number - int(ends[turn]) + int(self._sequences[shard])
        return shard, int(self._order_within(epoch, shard)[within])

    def _order(self, epoch: int) -> np.ndarray:
        """The shards in the order of an epoch."""
        return self._permutation(epoch, -1, len(self.files)) if self._shuffled else np.arange(len(self.files))

    def _order_within(self, epoch: int, shard: int) -> np.ndarray:
        """The sequences of a shard in the order of an epoch."""
        return self._permutation(epoch, shard, int(self._sequences[shard]))

    def _permutation(self, epoch: int, shard: int, length: int) -> np.ndarray:
        """A permutation that (seed, epoch, shard) decides, with -1 for the shards themselves.

        From numpy's RandomState, whose numbers are frozen for all of its versions, so that a run can be resumed after
        an upgrade.
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
        """Start copying the next batch to the GPU; the position that others see stays before it."""
        before = self._position
        x, y = (tensor.pin_memory() for tensor in self._advance())
        self._after_ahead = self._position
        self._position = before
        with torch.cuda.stream(self._copy_stream):
            return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _open(self, shard: int) -> np.ndarray:
        """The tokens of a shard; the first time, its ids are looked through."""
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
        """Refuse ids that the model does not know."""
        for start in range(0, len(tokens), SCAN_BLOCK):
            block = tokens[start : start + SCAN_BLOCK]
            if block.max() >= self.vocab_size:
                at = start + int(np.argmax(block >= self.vocab_size))
                raise BadInput(
                    f"{self.files[shard]}: token {at} has the id {tokens[at]}, and the model knows "
                    f"{self.vocab_size} ids; train on shards of the model's own tokenizer"
                )
