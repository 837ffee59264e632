"""Shards, byte by byte after docs/formats.md: written here with struct and read by us, and the other way."""

import struct

import numpy as np
import pytest

from common import BadInput
from data.shards import find_shards, open_shard, write_shard


def shard_bytes(tokens, magic=20240520, version=1, claimed=None) -> bytes:
    """A writer from docs/formats.md alone, without NumPy."""
    header = [magic, version, len(tokens) if claimed is None else claimed]
    return struct.pack(f"<256i{len(tokens)}H", *header, *[0] * 253, *tokens)


def random_tokens(n: int) -> list[int]:
    return np.random.default_rng(n).integers(0, 65536, n).tolist()


@pytest.mark.parametrize("tokens", [random_tokens(1), random_tokens(997), [0, 255, 256, 50256, 65535], []])
def test_written_and_read_to_the_byte(tmp_path, tokens):
    write_shard(tmp_path / "ours.bin", np.array(tokens, np.uint16))
    assert (tmp_path / "ours.bin").read_bytes() == shard_bytes(tokens)
    (tmp_path / "theirs.bin").write_bytes(shard_bytes(tokens))
    read = open_shard(tmp_path / "theirs.bin")
    assert read.dtype == np.uint16 and read.tolist() == tokens


def test_tokens_are_mapped_and_not_read(tmp_path):
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.write(shard_bytes([1, 2, 3], claimed=2**30))
        file.truncate(1024 + 2 * 2**30)  # 2 GiB of nothing, which take no room
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert len(tokens) == 2**30 and tokens[:4].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (shard_bytes([1, 2], magic=20240326), "magic number 20240326 instead of 20240520"),
        (shard_bytes([1, 2], version=2), "version 2 instead of 1"),
        (shard_bytes([1, 2], claimed=3), "claims 3 tokens and the file has 2"),
        (shard_bytes([1, 2])[:-1], "claims 2 tokens and the file has 1"),
        (shard_bytes([1, 2], claimed=-1), "claims -1 tokens"),
        (shard_bytes([])[:-1], "1023 bytes are less than the header"),
        (b"", "0 bytes are less than the header"),
    ],
)
def test_damaged_shard_is_refused_by_name(tmp_path, content, told):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=told) as refused:
        open_shard(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["", "nothing.bin"], ids=["a folder", "nothing"])
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name):
    with pytest.raises(BadInput, match=f"cannot read the shard {tmp_path / name}: "):
        open_shard(tmp_path / name)


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "shard.bin"
    path.write_bytes(b"mine")
    with pytest.raises(BadInput, match=f"{path} exists already"):
        write_shard(path, np.zeros(3, np.uint16))
    assert path.read_bytes() == b"mine"


def test_other_types_are_not_cut_to_uint16(tmp_path):
    with pytest.raises(TypeError):
        write_shard(tmp_path / "shard.bin", np.array([70_000]))
    assert list(tmp_path.iterdir()) == []


def test_shards_are_found_in_sorted_order(tmp_path):
    for name in ("train_10.bin", "train_02.bin", "val_00.bin", "train_01.bin"):
        (tmp_path / name).touch()
    names = [path.removeprefix(f"{tmp_path}/") for path in find_shards(f"{tmp_path}/train_*.bin")]
    assert names == ["train_01.bin", "train_02.bin", "train_10.bin"]
    with pytest.raises(BadInput, match=r"no shard matches .*test_\*\.bin"):
        find_shards(f"{tmp_path}/test_*.bin")
