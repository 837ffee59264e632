"""Shards of tokens on disk, in llm.c's format: 256 little-endian int32, then uint16 tokens.

docs/formats.md has it to the byte.
"""

import glob
import os
from pathlib import Path

import numpy as np

from common import BadInput, atomic_write
from readers import open_regular

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
REWRITE = "write it again with python -m data.prepare"


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write one shard. The file appears once it is complete.

    Args:
        path: a new file.
        tokens: (n,) uint16.

    Raises:
        BadInput: the file exists, or cannot be written.
    """
    if os.path.lexists(path):
        raise BadInput(f"{path} exists already; choose another place, or move it away")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2", casting="equiv").tobytes())


def open_shard(path: str | Path) -> np.ndarray:
    """Map the tokens of a shard into memory without reading them.

    Returns:
        (n,) uint16, read-only.

    Raises:
        BadInput: it does not exist, or is not an intact shard.
    """
    try:
        with open_regular(path, follow=True) as file:
            header = np.fromfile(file, "<i4", 256)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadInput(f"cannot read the shard {path}: {error.strerror or error}") from error
    if len(header) < 256:
        raise BadInput(f"{path}: {size} bytes are less than the header of a shard; {REWRITE}")
    magic, version, n_tokens = header[:3].tolist()
    if magic != MAGIC:
        raise BadInput(f"{path}: magic number {magic} instead of {MAGIC}: not a shard of tokens; {REWRITE}")
    if version != VERSION:
        raise BadInput(f"{path}: version {version} instead of {VERSION}; {REWRITE}")
    there = (size - HEADER_BYTES) // 2
    if n_tokens < 0 or n_tokens > there:
        raise BadInput(f"{path}: its header claims {n_tokens} tokens and the file has {there}; {REWRITE}")
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (n_tokens,))


def shard_lengths(pattern: str) -> list[int]:
    """The number of tokens in each shard that matches a glob. Raises what `find_shards` and `open_shard` raise."""
    return [len(open_shard(path)) for path in find_shards(pattern)]


def shard_pattern(folder: str | Path, kind: str) -> str:
    """A glob for a folder's shards of one kind, "train" or "val", with special characters in the path escaped."""
    pattern = os.path.join(glob.escape(str(folder)), f"{kind}_*.bin")
    return os.path.join(".", pattern) if pattern.startswith("-") else pattern  # or it would look like a flag


def find_shards(pattern: str) -> list[str]:
    """The sorted files that match a glob.

    Raises:
        BadInput: no file matches.
    """
    files = glob.glob(pattern)
    if not files:  # brackets in the folder's name may be literal
        folder, name = os.path.split(pattern)
        files = glob.glob(os.path.join(glob.escape(folder), name))
    if not files:
        raise BadInput(f"no shard matches {pattern}; make some with python -m data.prepare, or correct the pattern")
    return sorted(files)
