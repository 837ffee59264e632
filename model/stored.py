"""Tensors in files from others: safetensors, and files of torch.save.

Names, shapes and dtypes are read from the files' headers, before any tensor. torch.load is not used, not even with
`weights_only`: it trusts the sizes in the pickle, decompresses, and creates objects that are larger than the file.
"""

import collections
import functools
import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

from readers import JSON_LIMIT, integer, listed, one_of, parse_json, require


class StoredTensor(NamedTuple):
    """A tensor in a file. Its bytes are read by calling `read`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """raises ValueError if the file does not have the bytes that its header claims"""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Dtypes of masks, which are not used.
_SAFETENSORS_DTYPES |= {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}

_MAGIC = 0x1950A86A20F9469CFC6C
"""start of a file of torch.save that is not a zip file"""

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
}

_ENTRY = {
    "dtype": one_of(*_SAFETENSORS_DTYPES),
    "shape": listed(integer(), high=8),
    "data_offsets": listed(integer(), 2, 2),
}


def safetensors(file: BinaryIO) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file (https://github.com/huggingface/safetensors), by name.

    Raises:
        ValueError: the header is malformed, or its tensors do not fill the file without gaps or overlaps.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if size < 8 or length > JSON_LIMIT or start > size:
        raise ValueError(f"its header claims {length:,} bytes, and the file has {size:,}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        require(entry, _ENTRY, name)
        dtype, shape, (begin, end) = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: its shape and its data_offsets are not of one size")
        spans.append((begin, end))
        tensors[name] = StoredTensor(shape, dtype, functools.partial(_from_file, file, start + begin, dtype, shape))
    spans.sort()
    if [begin for begin, _ in spans] + [size - start] != [0] + [end for _, end in spans]:
        raise ValueError("the tensors in its header do not fill the file")
    return tensors


def _from_file(file: BinaryIO, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    n_bytes = math.prod(shape) * dtype.itemsize
    content = bytearray(n_bytes)
    file.seek(start)
    if file.readinto(content) != n_bytes:  # type: ignore[attr-defined]  # typing.BinaryIO lacks it
        raise ValueError("the file was cut meanwhile")
    return torch.frombuffer(content, dtype=dtype).view(shape) if n_bytes else torch.empty(shape, dtype=dtype)


def torch_tensors(file: BinaryIO) -> Any:
    """Read a file of `torch.save`, with a StoredTensor in place of every tensor: a dict of them for a state_dict.

    There are two formats: a zip file, and a sequence of pickles, from before torch 1.6.

    Raises:
        ValueError: it is something else, or not intact.
    """
    try:
        return _Zipped(file).load() if zipfile.is_zipfile(file) else _InARow(file).load()
    except ValueError:
        raise
    except Exception as error:  # broken zip files and pickles raise all kinds
        raise ValueError(f"it is nothing that torch.save wrote: {error or type(error).__name__}") from error


class _Saved:
    """Common part of the two formats: a pickle in which tensors refer to storages elsewhere in the file."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = file.seek(0, 2)
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def unpickle(self, file: BinaryIO) -> Any:
        classes = _STORAGES | {
            "torch._utils._rebuild_tensor_v2": lambda *given: self._rebuild(*given),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "collections.OrderedDict": lambda *_: collections.OrderedDict(),
        }
        return unpickle(file, classes, self._storage)

    def _storage(self, reference: Any) -> tuple[str, torch.dtype, int]:
        kind, dtype, key, _, n_elements, *view = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(view):
            raise ValueError("it names something that is no storage")
        require({"n": n_elements}, {"n": integer()})
        self.storages[key] = dtype, n_elements
        return key, dtype, n_elements

    def _rebuild(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        key, dtype, n_elements = storage
        if not (type(shape) is type(stride) is tuple and len(shape) == len(stride) <= 8):
            raise ValueError("a tensor has no shape")
        for value in (offset, *shape, *stride):
            require({"a size": value}, {"a size": integer()})
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if 0 in shape or last >= n_elements or math.prod(shape) > n_elements:
            raise ValueError(f"a tensor of shape {shape} is not in its storage of {n_elements} elements")

        def read() -> torch.Tensor:
            values = torch.frombuffer(self.content(key), dtype=dtype)
            if len(values) != n_elements:
                raise ValueError("a storage is not of the size that is claimed")
            return values.as_strided(shape, stride, offset)

        return StoredTensor(shape, dtype, read)

    def content(self, key: str) -> bytearray:
        """The bytes of a storage. Each kind of file reads its own."""
        raise NotImplementedError


class _Zipped(_Saved):
    def load(self) -> Any:
        self.zip = zipfile.ZipFile(self.file)
        pickles = [name for name in self.zip.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("there is no data.pkl in it")
        self.folder = pickles[0].removesuffix("data.pkl")
        order = self.folder + "byteorder"
        if order in self.zip.namelist() and self._record(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        return self.unpickle(io.BytesIO(self._record(pickles[0])))

    def content(self, key: str) -> bytearray:
        try:
            return self._record(f"{self.folder}data/{key}")
        except (KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"a storage cannot be read: {error}") from error

    def _record(self, name: str) -> bytearray:
        info = self.zip.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self.size:
            raise ValueError(f"{name} is compressed, or larger than the file")
        with self.zip.open(info) as record:
            return bytearray(record.read())


class _InARow(_Saved):
    """Magic number, version, sizes of C types, tensors, keys; then the length and content of each key's storage."""

    def load(self) -> Any:
        self.file.seek(0)
        if unpickle(self.file, {}) != _MAGIC:
            raise ValueError("it begins like nothing that torch.save writes")
        for _ in range(2):
            unpickle(self.file, {})
        tensors, keys = self.unpickle(self.file), unpickle(self.file, {})
        self.starts, at = {}, self.file.tell()
        for key in keys:
            dtype, n_elements = self.storages[key]
            self.starts[key] = at + 8, n_elements * dtype.itemsize
            at += 8 + n_elements * dtype.itemsize
        if at != self.size:
            raise ValueError(f"its storages end at byte {at:,} of {self.size:,}")
        return tensors

    def content(self, key: str) -> bytearray:
        start, n_bytes = self.starts[key]
        self.file.seek(start)
        return bytearray(self.file.read(n_bytes))


def unpickle(file: BinaryIO, classes: Mapping[str, Any], persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle. It can call nothing but what is in a table.

    A pickle may also set attributes of these objects, so they have to be immutable or created for this call. None may
    copy its arguments: a small pickle could then use much memory.

    Args:
        file: positioned at the start of the pickle.
        classes: objects by their "module.name" in the pickle.
        persistent_load: returns the object for a reference to something outside the pickle; None to refuse these.

    Raises:
        ValueError: the pickle is not intact, or names something else.
    """
    start = file.tell()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in classes:
                raise ValueError(f"its pickle names {module}.{name}, which has no place in it")
            return classes[f"{module}.{name}"]

        def persistent_load(self, reference: Any) -> Any:
            if persistent_load is None:
                raise ValueError("its pickle refers to something outside")
            return persistent_load(reference)

    try:
        for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
            # pickle would allocate memory for all smaller indices.
            if opcode.name.endswith("PUT") and (value or 0) > count:
                raise ValueError("its pickle leaves out indices")
        file.seek(start)
        return Unpickler(file).load()
    except ValueError:
        raise
    except Exception as error:  # broken pickles raise all kinds
        raise ValueError(f"it is no pickle that can be read: {error or type(error).__name__}") from error
