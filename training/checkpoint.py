"""Checkpoints: everything that a run needs to resume as if it had never stopped.

A checkpoint is the folder `checkpoints/step_N` of a run directory; N updates are done, as everywhere but in main.log:

    __R_0.distcp, .metadata   the tensors, in the format of torch.distributed.checkpoint: any number of ranks at any
                              ZeRO stage can read what any other wrote
    state.json                all other state: step, tokens, place in the data, outlier windows, loss scale, RNGs,
                              configuration, versions
    SHA256SUMS                of every file above, for `sha256sum -c`; other files are ignored

It is written in the background as `.step_N.part`, and renamed when all of it is on disk. So a folder of that name was
intact once; its sums show whether it still is. All ranks write to the same file system.
"""

import contextlib
import errno
import json
import os
import platform
import random
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from common import BadInput, print0, write_errors
from data.loader import ShardLoader
from model.gpt import GPT
from training import distributed, optim
from training.config import CHECKPOINTS as FOLDER
from training.config import Resume, is_checkpoint
from training.distributed import World
from training.faults import UpdateGuard
from training.saved import METADATA, STATE, SUMS, TensorReader, read_state, sha256, step_of, verify

# It warns at every save of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass
class TrainState:
    """What changes during a run."""

    gpt: GPT
    params: Mapping[str, torch.Tensor]
    """its parameters by name, the tied matrix once; below stage 2 whole, above this rank's shards"""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: ShardLoader
    guard: UpdateGuard
    device: torch.device
    step: int = 0
    """updates done or skipped"""
    tokens: int = 0
    """read for them, by all ranks"""

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The weights and AdamW's state of this rank. Names do not depend on the stage or the number of ranks."""
        names = {p: name for name, p in self.params.items()}
        adam = optim.adamw_state(self.optimizer)
        return {
            "model": {name: p.detach() for name, p in self.params.items()},
            "optimizer": {f"{names[p]}.{kind}": value for p in adam for kind, value in adam[p].items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """All other state, for JSON. It is the same on every rank."""
        rng_state: Any = np.random.get_state()
        kind, keys, *position = rng_state
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "torch": bytes(torch.get_rng_state().tolist()).hex(),
                "cuda": None if cuda is None else bytes(cuda.tolist()).hex(),
                "python": random.getstate(),
                "numpy": [kind, keys.tolist(), *position],
            },
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, except the loader's position: that is restored when it is checked.

        Raises:
            ValueError: a random number generator refuses its state.
        """
        self.step = saved["step"]
        self.tokens = saved["tokens"]
        self.guard.load_state_dict(saved["guard"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        rng = saved["rng"]
        try:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(rng["torch"]), dtype=torch.uint8))
            if rng["cuda"] and self.device.type == "cuda":
                cuda = torch.frombuffer(bytearray.fromhex(rng["cuda"]), dtype=torch.uint8)
                torch.cuda.set_rng_state(cuda, self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{STATE}: rng: {str(error).splitlines()[0]}") from error
        version, internal, gauss = rng["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *position = rng["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), *position))


class Checkpoints:
    """The checkpoints of a run: saves in the background, one at a time, and deletes those that are not kept.

    Args:
        run_dir: the run directory; None to save nothing.
        world: the ranks; each has to make the same calls.
        metadata: written beside the state: flags, network, versions; see `differences`.
        keep: how many of the newest are kept.
        keep_every: those of a step that is a multiple are kept as well; 0 for none.
    """

    def __init__(
        self,
        run_dir: Path | None,
        world: World,
        metadata: dict[str, Any],
        keep: int = 2,
        keep_every: int = 0,
    ):
        self.folder = run_dir / FOLDER if run_dir else None
        self.world, self.metadata = world, metadata
        self.keep, self.keep_every = keep, keep_every
        self._saving: tuple[int, Any] | None = None  # a step, and a Future
        self.failed = False
        """whether the last finished save failed"""
        on_cuda = world.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_cuda,
            )
        )
        self._group = self._new_group() if world.distributed and run_dir else None

    def _new_group(self) -> dist.ProcessGroup:
        """A group of its own: collectives of the background must not mix with those of training."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.world.timeout_s))

    def warm_up(self, state: TrainState) -> None:
        """Allocate the memory into which a save copies tensors, so that the first save is no slower than others."""
        self._stager.stage(self._share(state))

    def save(self, state: TrainState) -> None:
        """Copy the state, and write it while training continues. An unfinished save is waited for.

        A save that fails is reported, and does not touch the earlier ones.
        """
        self.wait()
        if self._group and any(distributed.gather(self.world, self.failed)):  # gloo closes a group that timed out
            dist.destroy_process_group(self._group)
            self._group = self._new_group()
        assert self.folder
        folder = self.folder / f"step_{state.step}"
        content = json.dumps(state.state_dict() | self.metadata).encode() + b"\n"
        try:
            future = dcp.async_save(
                self._share(state),
                storage_writer=_Writer(folder, content, self._prune),
                process_group=self._group,
                async_stager=self._stager,
                no_dist=not self.world.distributed,
            )
        except OSError as error:
            future = Future()
            future.set_exception(error)
        self._saving = state.step, future

    def wait(self) -> None:
        """Wait for an unfinished save, and report it if it failed."""
        if self._saving:
            assert self.folder
            (step, future), self._saving = self._saving, None
            error = future.exception()
            if error and self.world.is_main:
                print0(f"warning: the checkpoint of step {step} was not written: {_reason(error)}; {self.newest()}")
                with contextlib.suppress(OSError):
                    _remove(_part(self.folder / f"step_{step}"))
            self.failed = error is not None

    def newest(self) -> str:
        """The newest checkpoint, in words."""
        newest = next(iter(find(self.folder)), None) if self.folder else None
        return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"

    @property
    def saving(self) -> bool:
        """Whether there is a save that neither `wait` nor `poll` has seen finished."""
        return self._saving is not None

    def poll(self) -> None:
        """Report a failed save, without waiting."""
        if self._saving and self._saving[1].done():
            self.wait()

    def load(self, folder: Path, state: TrainState) -> None:
        """Load a checkpoint from `choose` into the state, except for the position of its loader.

        Raises:
            BadInput: the tensors are wrong, or a random number generator refuses its state.
        """
        tensors, saved = state.tensors(), read_state(folder)
        try:
            dcp.load(
                tensors,
                storage_reader=TensorReader(folder),
                process_group=self._group,
                no_dist=not self.world.distributed,
            )
            for name, tensor in tensors["optimizer"].items():
                if name.endswith(".step") and not 0 <= tensor.item() <= saved["step"]:
                    raise ValueError(f"{name} is {tensor.item():g}, in a checkpoint of step {saved['step']}")
            state.load_state_dict(saved)
        except (CheckpointException, ValueError) as error:
            raise BadInput(f"{folder} cannot be resumed from: {_reason(error)}; name another checkpoint") from error

    def _share(self, state: TrainState) -> dict[str, dict[str, torch.Tensor]]:
        """What this rank writes: its shards, and a part of the tensors that are the same on all ranks."""
        shares: dict[str, dict[str, torch.Tensor]] = {}
        sizes = [0] * self.world.size
        for part, tensors in state.tensors().items():
            shares[part] = {}
            for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
                owner = self.world.rank
                if not isinstance(tensor, DTensor):
                    owner = sizes.index(min(sizes))
                    sizes[owner] += tensor.nbytes
                if owner == self.world.rank:
                    shares[part][name] = tensor
        return shares

    def _prune(self) -> None:
        """Delete the checkpoints that are not kept, once a newer one is on disk."""
        assert self.folder
        own = [folder for folder in find(self.folder) if not folder.is_symlink()]  # a link takes no room
        for folder in own[self.keep :]:
            if not (self.keep_every and step_of(folder) % self.keep_every == 0):
                try:
                    _delete(folder)
                except OSError as error:  # the newer one is on disk all the same
                    print0(f"warning: {folder} cannot be deleted: {error.strerror}")


class _Writer(dcp.FileSystemWriter):
    """Writes one checkpoint under a hidden name, hashes its files, and renames it at the end.

    torch.distributed.checkpoint calls `write_data` on every rank and then, if all succeeded, `finish` on one.
    """

    def __init__(self, folder: Path, state: bytes, prune: Callable[[], None]):
        if _part(folder).is_symlink():
            raise OSError(errno.ELOOP, f"{_part(folder)} is a link; remove it")
        super().__init__(_part(folder))
        self.folder, self.state, self.prune = folder, state, prune

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future:
        try:
            results = super().write_data(plan, planner).wait()
        except RuntimeError as error:  # torch.save hides what the operating system said
            link: BaseException | None = error
            while link and not isinstance(link, OSError):
                link = link.__context__
            raise (link or error) from None
        names = {result.storage_data.relative_path for result in results}
        sums = {name: sha256(Path(self.path) / name) for name in names}
        future: torch.futures.Future = torch.futures.Future()
        future.set_result([_Summed(r.index, r.size_in_bytes, r.storage_data, sums) for r in results])
        return future

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        part = Path(self.path)
        _write(part / STATE, self.state)
        sums = {name: digest for rank in results for result in rank for name, digest in result.sums.items()}
        sums |= {name: sha256(part / name) for name in (METADATA, STATE)}
        _write(part / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())
        _sync_folder(part)
        os.rename(part, self.folder)
        _sync_folder(self.folder.parent)
        self.prune()


@dataclass(frozen=True)
class _Summed(WriteResult):
    """What a rank reports about a tensor that it wrote, with the SHA-256 of its files."""

    sums: dict[str, str]


def find(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first.

    Raises:
        BadInput: the folder cannot be listed.
    """
    return [path for path in _named_steps(folder) if os.path.isdir(path)]


def _named_steps(folder: Path) -> list[Path]:
    """Everything with the name of a checkpoint, the newest first."""
    return sorted((folder / name for name in _names_in(folder) if is_checkpoint(Path(name))), key=step_of, reverse=True)


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BadInput(
            f"cannot look into {folder}: {error.strerror}; name another folder, or make it readable"
        ) from error


def choose(resume: Resume, run_dir: Path | None, world: World) -> Path | None:
    """The checkpoint that `--resume` means, checked against its sums. Every rank takes part.

    Args:
        resume: from `Config.resume_from`.
        run_dir: where `auto` looks.
        world: the ranks.

    Returns:
        The checkpoint, or None to start from scratch.

    Raises:
        BadInput: a path has no checkpoint, or there are some and none of them is intact.
    """
    run = run_dir if resume.auto else resume.path
    if run is None:
        return None
    if resume.is_checkpoint:
        candidates = [run] if os.path.isdir(run) else []
    else:  # one rank looks, so that no rank looks for what another has just moved
        candidates = distributed.on_main(world, lambda: find(run / FOLDER))
    if not candidates and not resume.auto:
        raise BadInput(
            f"--resume {resume.given}: no checkpoint there; name a run directory, or one of its {FOLDER}/step_N"
        )
    for folder in candidates:
        wrong = [w for w in distributed.gather(world, verify(folder, world.rank, world.size)) if w]
        if not wrong:
            return folder
        if resume.is_checkpoint:
            raise BadInput(f"--resume {resume.given}: {wrong[0]}; name another checkpoint")
        print0(f"refused {folder.name}: {wrong[0]}; trying the one before")
    if candidates:
        instead = "name another --output_dir to start from scratch" if resume.auto else "name another run directory"
        raise BadInput(
            f"--resume {resume.given}: none of the {len(candidates)} checkpoints in {run / FOLDER} is intact; {instead}"
        )
    return None


def remove_leftovers(run_dir: Path, step: int) -> list[str]:
    """Remove what killed saves left, and set aside the checkpoints after a step, because this run will repeat them.

    Links are removed or renamed themselves; their targets are not touched.

    Returns:
        The new names of those that were set aside.

    Raises:
        BadInput: the operating system refused.
    """
    aside = []
    with write_errors(run_dir / FOLDER):
        for name in _names_in(run_dir / FOLDER):
            if re.fullmatch(r"\.step_[0-9]+\.part", name):
                _remove(run_dir / FOLDER / name)
        for path in _named_steps(run_dir / FOLDER):
            if step_of(path) > step:
                target = path.with_name(f"{path.name}.aside")
                _remove(target)
                path.rename(target)
                aside.append(target.name)
    return aside


def differences(saved: dict[str, Any], metadata: dict[str, Any], kind: str) -> list[str]:
    """The settings in which this run differs from the one that wrote a checkpoint.

    Args:
        saved: from `read_state`.
        metadata: of this run.
        kind: "network" or "flags".

    Returns:
        A phrase for each, with its name and both values.
    """
    return [
        f"{kind} {name} was {saved[kind].get(name)} and is {value}"
        for name, value in metadata[kind].items()
        if saved[kind].get(name) != value
    ]


def versions() -> dict[str, str]:
    """Versions that results may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def _part(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _delete(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half deleted one does not look intact."""
    part = _part(folder)
    _remove(part)
    os.rename(folder, part)
    _remove(part)


def _remove(path: Path) -> None:
    """Delete a folder and its content, a file, or a link but not its target. The path may be missing."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    if hasattr(os, "O_DIRECTORY"):  # Windows syncs no folders
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The first cause, and its rank, in what torch.distributed.checkpoint raises."""
    if not isinstance(error, CheckpointException):
        return str(error)
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {' '.join(str(cause).split())}"
