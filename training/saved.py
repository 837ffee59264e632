"""Reading a checkpoint that may come from anybody: its sums, its state, its tensors.

Sums do not protect against whoever writes the folder. So only regular files in it are read, every field of state.json
is checked, and pickles are read without calling anything that they name.
"""

import hashlib
import io
import math
import os
import re
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from common import BadInput
from model.stored import StoredTensor, torch_tensors, unpickle
from readers import (
    JSON_LIMIT,
    Check,
    either,
    integer,
    listed,
    mapped,
    number,
    one_of,
    open_regular,
    read_json,
    require,
    text,
)
from training.faults import MOST_SKIPPED, WINDOW

STATE, METADATA, SUMS = "state.json", ".metadata", "SHA256SUMS"
METADATA_LIMIT = 512 << 20
"""bytes; about 270 for each part of a tensor that a rank writes"""
MOST_EPOCHS = 10**6

_WORD = integer(0, 2**32 - 1)
_GAUSS = number(-100.0, 100.0)  # the second of a pair of normal numbers, if it was not used yet
_FLOAT32 = number(-3.5e38, 3.5e38)
_SETTING = either(
    one_of(None, True, False), integer(-(2**63)), number(-1e308, 1e308), Check("a string", lambda v: isinstance(v, str))
)
_IS_PYTHON_RNG = Check(
    "Python's random state",
    lambda v: (
        isinstance(v, list)
        and len(v) == 3
        and v[0] == 3
        and listed(_WORD, 625, 625).holds(v[1])
        and v[1][-1] <= 624
        and either(one_of(None), _GAUSS).holds(v[2])
    ),
)
_IS_NUMPY_RNG = Check(
    "numpy's random state",
    lambda v: (
        isinstance(v, list)
        and len(v) == 5
        and v[0] == "MT19937"
        and listed(_WORD, 624, 624).holds(v[1])
        and integer(0, 624).holds(v[2])
        and integer(0, 1).holds(v[3])
        and _GAUSS.holds(v[4])
    ),
)

# The schema of state.json; see `require`.
_FIELDS: dict[str, Any] = {
    "step": integer(),
    "tokens?": integer(),  # the first checkpoints have none
    "loader": {
        "lengths": listed(integer(1), 1),
        "digest?": text("[0-9a-f]{64}"),
        "shard?": integer(),
        "base?": integer(),
        "sequence?": integer(),
    },
    "guard": {
        "windows": {"loss": listed(_FLOAT32, high=WINDOW), "norm": listed(_FLOAT32, high=WINDOW)},
        "skipped": integer(),
        "in_a_row": integer(0, MOST_SKIPPED),
    },
    "scaler": {
        "scale?": number(1e-45, 3.4e38),
        "growth_factor?": number(1.0, 1e6),
        "backoff_factor?": number(1e-6, 1.0),
        "growth_interval?": integer(1, 2**31 - 1),
        "_growth_tracker?": integer(0, 2**31 - 1),
    },
    "rng": {
        "torch": text("([0-9a-f]{2})+"),
        "cuda": either(one_of(None), text("([0-9a-f]{2})+")),
        "python": _IS_PYTHON_RNG,
        "numpy": _IS_NUMPY_RNG,
    },
    "flags": mapped(_SETTING),
    "network": mapped(integer(1)),
}
_FLAGS = {"sequence_length": integer(1), "total_batch_size": integer(1)}
_ALL_OF_A_SCALER = {field.removesuffix("?") for field in _FIELDS["scaler"]}


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def verify(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Check a checkpoint against its sums.

    Args:
        folder: the checkpoint.
        part: of the work, from 0; each rank reads some of the files.
        parts: number of parts.

    Returns:
        The first error, with the file's name; None for an intact checkpoint.
    """
    try:
        with open_regular(folder / SUMS, limit=JSON_LIMIT) as file:
            lines = file.read().decode().splitlines()
        matches = [re.fullmatch(r"([0-9a-f]{64})  (\.?\w[\w.-]*)", line) for line in lines]
        sums = {match[2]: match[1] for match in matches if match}
        if None in matches:
            raise ValueError("it has lines that are not sums")
    except (OSError, ValueError) as error:
        return str(BadInput(f"{folder / SUMS} cannot be read: {why(error)}"))
    for name in (METADATA, STATE):
        if name not in sums:
            return str(BadInput(f"{folder / SUMS} has no sum of {name}"))
    for name in sorted(sums)[part::parts]:
        try:
            if sha256(folder / name) != sums[name]:
                return f"{folder / name} is not what was written: its SHA-256 differs from the one in {SUMS}"
        except OSError as error:
            return str(BadInput(f"{folder / name} cannot be read: {error.strerror}"))
    if part == 0:
        try:
            read_state(folder)
            for place in TensorReader(folder).places.values():
                if place.file not in sums:
                    return str(BadInput(f"{folder / SUMS} has no sum of {place.file}"))
        except BadInput as error:
            return str(error).removesuffix("; name another checkpoint")
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors, step and tokens included.

    Raises:
        BadInput: it is not what `TrainState.state_dict` gave.
    """
    try:
        state = read_json(folder / STATE, _FIELDS)
        if state["step"] != step_of(folder):
            raise ValueError(f"it is of step {state['step']}")
        if state["scaler"] and state["scaler"].keys() != _ALL_OF_A_SCALER:
            raise ValueError("scaler has other fields than it was saved with")
        require(state["flags"], _FLAGS, "flags")
        _check_position(state["loader"], state["flags"]["sequence_length"])
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / STATE} cannot be used: {why(error)}; name another checkpoint") from error
    state.setdefault("tokens", state["step"] * state["flags"]["total_batch_size"])
    return state


def _check_position(loader: dict[str, Any], sequence_length: int) -> None:
    """Refuse a position that is in none of the shards."""
    lengths = loader["lengths"]
    if "sequence" in loader:
        in_an_epoch = sum((length - 1) // sequence_length for length in lengths)
        if loader["sequence"] >= in_an_epoch * MOST_EPOCHS:
            raise ValueError(f"loader.sequence is {loader['sequence']}, and an epoch has {in_an_epoch}")
    elif loader.get("shard", -1) not in range(len(lengths)) or loader.get("base", -1) not in range(
        lengths[loader["shard"]]
    ):
        raise ValueError(f"loader.shard {loader.get('shard')} with loader.base {loader.get('base')} is in no shard")


class _Place(NamedTuple):
    """Where a part of a tensor is stored."""

    file: str
    offset: int
    length: int


class TensorReader(dcp.StorageReader):
    """Reads what `dcp.FileSystemWriter` wrote. `dcp.FileSystemReader` would call what a pickle names.

    Raises:
        BadInput: the metadata cannot be used.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.metadata, self.places = _read_metadata(folder)
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder / METADATA} cannot be used: {why(error)}; name another checkpoint") from error

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future:
        for item in plan.items:
            tensor = self._read(self.places[item.storage_index])
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != tensor.shape:
                raise ValueError(f"{item.storage_index.fqn} is of another shape in its file than in {METADATA}")
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(None)
        return future

    def _read(self, place: _Place) -> torch.Tensor:
        try:
            with open_regular(self.folder / place.file) as file:
                file.seek(place.offset)
                stored = torch_tensors(io.BytesIO(file.read(place.length)))
            if not isinstance(stored, StoredTensor):
                raise ValueError("it is no tensor")
            return stored.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"{place.file} at byte {place.offset:,}: {why(error)}") from error


def _read_metadata(folder: Path) -> tuple[Metadata, dict[MetadataIndex, _Place]]:
    """Shapes of a checkpoint's tensors, and where their parts are stored: within the files, and complete.

    Raises:
        OSError: a file cannot be opened.
        ValueError: it is not what torch.distributed.checkpoint writes for tensors.
    """

    class Pickled:
        """Replaces every class in the pickle, and keeps the state of its objects."""

        def __setstate__(self, state: Any) -> None:
            self.state = state

    def first(value: Any = None, *_: Any) -> Any:
        """Replaces every function: torch.Size of a tuple is the tuple."""
        return value

    classes: dict[str, Any] = dict.fromkeys(_PICKLED, Pickled) | dict.fromkeys(_CALLED, first)
    with open_regular(folder / METADATA, limit=METADATA_LIMIT) as file:
        top = unpickle(io.BytesIO(file.read()), classes | {"torch.float32": torch.float32})
    tensors, places, sizes = {}, {}, {}
    try:
        for index, info in top.state["storage_data"].items():
            place = _Place(*(info.state[name] for name in ("relative_path", "offset", "length")))
            if not re.fullmatch(r"\w[\w.-]*\.distcp", place.file) or info.state.get("transform_descriptors"):
                raise ValueError(f"{place.file!r} is no file of tensors")
            if place.file not in sizes:
                with open_regular(folder / place.file) as file:
                    sizes[place.file] = os.fstat(file.fileno()).st_size
            if sum(_sizes((place.offset, place.length))) > sizes[place.file]:
                raise ValueError(f"{place.file} has no {place.length} bytes at {place.offset}")
            places[MetadataIndex(_name(index.state["fqn"]), _sizes(index.state["offset"]))] = place
        for name, tensor in top.state["state_dict_metadata"].items():
            size, chunks = _sizes(tensor.state["size"]), []
            for chunk in tensor.state["chunks"]:
                offsets, lengths = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
                within = all(o + n <= s for o, n, s in zip(offsets, lengths, size, strict=True))
                if not within or MetadataIndex(_name(name), offsets) not in places:
                    raise ValueError(f"a part of {name} is missing")
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths)))
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
                raise ValueError(f"the parts of {name} do not add up to it")
            properties = TensorProperties(dtype=torch.float32)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(size), chunks)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is not that of a checkpoint: {error!r}") from error
    return Metadata(dict(tensors)), places


# The names in `.metadata`, of torch 2.11 to 2.13 and Python 3.11 to 3.14. They are not imported.
_CLASSES = "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex StorageMeta"
_PICKLED = (
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in _CLASSES.split()),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
)
_CALLED = (
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.Size",
    "torch.serialization._get_layout",
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
)


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(n) is int and 0 <= n < 2**62 for n in value):
        raise ValueError(f"{reprlib.repr(value)} are not sizes")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise ValueError(f"{reprlib.repr(value)} is not a name")
    return value


def why(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
