"""Faults of long runs: updates that would ruin the weights, ranks that die, hang or disagree."""

import collections
import contextlib
import hashlib
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from common import print_error
from training import distributed
from training.distributed import RunStopped, World

WINDOW = 128
"""values in an outlier's mean and deviation, as in llm.c"""
MOST_SKIPPED = 20
"""updates in a row skipped for values that are not finite, after which a run stops; float16 needs a few to find its
loss scale"""

PULSE_S = 1.0
SILENCE_S = 3.0
"""a rank that has not written its pulse for this long is considered dead"""


class UpdateGuard:
    """Decides whether to skip an update, from the loss and the gradient norm that all ranks agreed on.

    Updates with values that are not finite are always skipped. A finite value is an outlier if it is more than so many
    standard deviations above the mean of the last 128, itself included; before 128 values there are none (llm.c's
    outlier detector).

    Args:
        loss_z: standard deviations for the loss; 0 for no limit.
        norm_z: the same for the norm.
    """

    def __init__(self, loss_z: float = 0.0, norm_z: float = 0.0):
        self.limits = {"loss": loss_z, "norm": norm_z}
        self.windows: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=WINDOW) for name in self.limits
        }
        self.skipped = 0
        """updates skipped so far, for any reason"""
        self.in_a_row = 0
        """the last updates, if they were skipped for values that are not finite"""

    def reason_to_skip(self, where: str, loss: float, norm: float) -> str | None:
        """Why the update with this loss and norm must be skipped, in words, or None. Skipped updates are counted.

        Args:
            where: the step, and the data that were read, in words.
            loss: nats.
            norm: of the gradient, before it is clipped.

        Raises:
            RunStopped: too many in a row were not finite.
        """
        values = {"loss": loss, "norm": norm}
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= MOST_SKIPPED:
                raise RunStopped(f"{where}: {' and '.join(broken)}, as in the {MOST_SKIPPED - 1} steps before")
            return f"{where}: {' and '.join(broken)}; update skipped ({self.in_a_row} in a row, {MOST_SKIPPED} stop)"
        self.in_a_row = 0
        for name, value in values.items():
            self.windows[name].append(value)
        for name, value in values.items():
            z = _z_score(self.windows[name])
            if 0 < self.limits[name] < z:
                self.skipped += 1
                return (
                    f"{where}: {name} {value:.6g} is {z:.1f} standard deviations above the mean of the last {WINDOW}; "
                    "update skipped"
                )
        return None

    def state_dict(self) -> dict:
        """Everything that later decisions depend on, for JSON."""
        return {
            "windows": {name: list(window) for name, window in self.windows.items()},
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.windows = {name: collections.deque(state["windows"][name], maxlen=WINDOW) for name in self.limits}
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _z_score(window: collections.deque) -> float:
    """Standard deviations of the last value above the mean of a full window; 0 before it is full."""
    if len(window) < WINDOW:
        return 0.0
    deviation = statistics.pstdev(window)
    return (window[-1] - statistics.fmean(window)) / deviation if deviation else 0.0


def compare_ranks(world: World, step: int, params: Mapping[str, torch.Tensor], values: Mapping[str, object]) -> None:
    """Compare the ranks' weights, and whatever else has to be the same on all of them.

    Args:
        world: the ranks; each takes part.
        step: updates done, for the message.
        params: weights by name; sharded ones are compared as each rank puts them together.
        values: anything else that must agree, by name; compared by its `repr`.

    Raises:
        RunStopped: on every rank, naming the ranks in the minority and the first value in which they differ.
    """
    weights = distributed.FullWeights(params)
    digests = {name: _digest(weights[name]) for name in weights}
    digests |= {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in values.items()}
    all_digests = distributed.gather(world, list(digests.values()))
    common, _ = collections.Counter(map(tuple, all_digests)).most_common(1)[0]
    odd = [rank for rank, theirs in enumerate(all_digests) if tuple(theirs) != common]
    if odd:
        names = list(digests)
        differing = [name for i, name in enumerate(names) if all_digests[odd[0]][i] != common[i]]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        others = next(rank for rank in range(world.size) if rank not in odd)
        differ = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} differ"
        raise RunStopped(f"after step {step} the ranks disagree: {differ} from rank {others} in {differing[0]}{more}")


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


class Watchdog:
    """Tracks where each rank is, so that a stalled rank can report which one it waits for.

    A thread of each rank writes its place in the run to the store of the process group every second. When a collective
    fails, or after most of the time-out without progress, the places of the others show which rank died (it no longer
    writes) and which hangs (it is still at an earlier place). Clocks of different machines are not compared.

    Args:
        world: the ranks; with one process, nothing happens.
    """

    def __init__(self, world: World):
        self.world = world
        self._place = (0, 0, "starting")
        self._since = time.monotonic()
        self._ended = False
        self._over = threading.Event()
        self._store: Any = world.store and world.store.clone()  # type: ignore[attr-defined]
        self._others = [rank for rank in range(world.size) if rank != world.rank]

    def at(self, step: int, what: str) -> None:
        """Note where this rank is. All ranks note the same places in the same order.

        Args:
            step: the update that is being made, or the last one that was.
            what: what is being done.
        """
        self._place = (step, self._place[1] + 1 if step == self._place[0] else 0, what)
        self._since = time.monotonic()

    @property
    def place(self) -> str:
        """Where this rank is, in words."""
        step, _, what = self._place
        return f"step {step} ({what})"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """If a collective fails inside, print why and end this process."""
        if not self._store:
            yield
            return
        self._write()
        threading.Thread(target=self._pulse, daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not _is_about_other_ranks(error):
                raise
            print_error(self._explain(error))
            self._ended = True
            with contextlib.suppress(RuntimeError):  # the store may be gone too
                self._write()
            if self.world.is_main:  # it may host the store, which the others still read
                time.sleep(SILENCE_S + PULSE_S)
            os._exit(1)  # threads that wait for the others would keep the process alive
        finally:
            self._over.set()

    def _pulse(self) -> None:
        reported = None
        while not self._over.wait(PULSE_S):
            try:
                self._write()
            except RuntimeError:  # the store is gone: rank 0 or torchrun has ended, and ends this process too
                return
            # NCCL will end the process without an exception, so the line has to come before.
            if time.monotonic() - self._since > 0.8 * self.world.timeout_s and reported != self._since:
                reported = self._since
                print_error(self._explain(None))

    def _write(self) -> None:
        self._store.set(f"pulse/{self.world.rank}", json.dumps([time.monotonic(), *self._place, self._ended]))

    def _pulses(self) -> dict[int, list]:
        """What each of the other ranks last wrote."""
        there = [rank for rank in self._others if self._store.check([f"pulse/{rank}"])]
        return {rank: json.loads(self._store.get(f"pulse/{rank}")) for rank in there}

    def _explain(self, error: Exception | None) -> str:
        """One line: where this rank is, what it waited for, who is missing."""
        waited = time.monotonic() - self._since
        here = f"[rank {self.world.rank}] waited {waited:.0f} s for the other ranks at {self.place}"
        try:
            before = self._pulses()
            for _ in range(round(SILENCE_S / PULSE_S)):
                time.sleep(PULSE_S)
                self._write()  # others may be listening for this one
            after = self._pulses()
        except RuntimeError:
            return f"{here}: rank 0 is gone, and the store that it hosts"
        gone, behind = [], []
        for rank in self._others:
            _, step, count, what, ended = after.get(rank, (0.0, 0, 0, "starting", False))
            if after.get(rank) == before.get(rank) and not ended:
                gone.append(f"rank {rank} is gone, last heard of at step {step} ({what})")
            elif (step, count) < self._place[:2]:
                behind.append(f"rank {rank} has not arrived, it is at step {step} ({what})")
        missing = gone or behind or ["none of them is behind"]
        reason = f" ({' '.join(str(error).split())[:160]})" if error and not (gone or behind) else ""
        return f"{here}: {'; '.join(missing)}{reason}"


def _is_about_other_ranks(error: RuntimeError) -> bool:
    """Whether a collective failed: torch's backends raise RuntimeError, or subclasses of their own."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or any(
        sign in text for sign in ("gloo", "Connection closed", "Timed out", "NCCL", "Application timeout")
    )
