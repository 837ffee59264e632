"""The loader: the order of llm.c, derived here from the tokens alone."""

import itertools
import os
import resource
import struct
import sys

import numpy as np
import pytest
import torch

import data.loader
from common import BadInput
from data.loader import ShardLoader

T = 5
GLOBAL_BATCH = 8  # sequences that all ranks read together, so 40 tokens a step
# One window exactly; multiples of nothing; two windows exactly; one token short of two and of four; many windows.
LENGTHS = [41, 97, 81, 80, 160, 1009]


def write_shards(folder, lengths, vocab_size=50257, seed=3) -> tuple[str, list[np.ndarray]]:
    """Shards of random ids; returns a glob, and the tokens of each."""
    rng = np.random.default_rng(seed)
    shards = [rng.integers(0, vocab_size, length).astype("<u2") for length in lengths]
    for index, tokens in enumerate(shards):
        header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
        (folder / f"train_{index:06d}.bin").write_bytes(header + tokens.tobytes())
    return str(folder / "train_*.bin"), shards


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("corpus"), LENGTHS)


def llmc_windows(shards, stride):
    """What all ranks read together, step by step: base, base + stride, ... and the next shard once none fits."""
    for tokens in itertools.cycle(shards):
        base = 0
        while base + stride + 1 <= len(tokens):
            yield tokens[base : base + stride + 1].astype(np.int64)
            base += stride


def ranks(pattern, world, batch_size=None, **options):
    batch_size = batch_size or GLOBAL_BATCH // world
    return [ShardLoader(pattern, batch_size, T, rank, world, **options) for rank in range(world)]


def step(loaders) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of all ranks, in the order of the ranks."""
    batches = [loader.next_batch() for loader in loaders]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return inputs, targets


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


ROUND_TRIP = 1 + 2 + 2 + 1 + 3 + 25  # windows of 40 + 1 tokens in LENGTHS
STEPS = 2 * ROUND_TRIP + 3
worlds = pytest.mark.parametrize("world", [1, 2, 4, 8])


@worlds
def test_ranks_together_read_what_one_process_reads(corpus, world):
    pattern, shards = corpus
    loaders = ranks(pattern, world)
    one = ShardLoader(pattern, GLOBAL_BATCH, T)
    windows = llmc_windows(shards, GLOBAL_BATCH * T)
    for _ in range(STEPS):
        x, y = step(loaders)
        window = torch.from_numpy(next(windows))
        assert torch.equal(x.flatten(), window[:-1]) and torch.equal(y.flatten(), window[1:])
        assert same((x, y), one.next_batch()) and x.shape == y.shape == (GLOBAL_BATCH, T)
        assert all(loader.state_dict() == one.state_dict() for loader in loaders)


@worlds
def test_saved_and_restored_in_the_middle(corpus, world):
    """After every number of steps, and by twice and by half as many ranks."""
    pattern, _ = corpus
    loaders = ranks(pattern, world)
    batches, states = [], []
    for _ in range(STEPS):
        states.append(loaders[0].state_dict())
        batches.append(step(loaders))
    for other_world in {world, min(8, 2 * world), max(1, world // 2)}:
        others = ranks(pattern, other_world)
        for at in range(0, STEPS - 3):
            for loader in others:
                loader.load_state_dict(states[at])
            assert all(same(step(others), batches[at + i]) for i in range(3)), at


def test_restored_with_a_larger_batch_than_what_is_left_of_the_shard(tmp_path):
    pattern, (_, second) = write_shards(tmp_path, [41, 97])
    loader = ShardLoader(pattern, 1, T)
    for _ in range(7):
        loader.next_batch()  # base 35, where a window of 8 still fits and one of 40 does not
    larger = ShardLoader(pattern, GLOBAL_BATCH, T)
    larger.load_state_dict(loader.state_dict())
    assert torch.equal(larger.next_batch()[0].flatten(), torch.from_numpy(second[:40].astype(np.int64)))


def test_position_of_other_shards_is_refused(corpus, tmp_path):
    pattern, _ = write_shards(tmp_path, LENGTHS[:-1])
    loader = ShardLoader(pattern, GLOBAL_BATCH, T)
    first = loader.next_batch()
    with pytest.raises(BadInput, match=r"is of 6 shards with 1468 tokens, and --input_bin has 5 with 459"):
        loader.load_state_dict(ShardLoader(corpus[0], GLOBAL_BATCH, T).state_dict())
    loader.reset()
    assert same(loader.next_batch(), first)


@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
def test_position_of_shards_of_the_same_lengths_is_refused(corpus, tmp_path, at, monkeypatch):
    monkeypatch.setattr(data.loader, "END", 10)
    state = ShardLoader(corpus[0], GLOBAL_BATCH, T).state_dict()
    pattern, tokens = write_shards(tmp_path, LENGTHS)
    ShardLoader(pattern, GLOBAL_BATCH, T).load_state_dict(state)  # wherever they are
    path = tmp_path / "train_000003.bin"
    tokens[3][at] ^= 1
    path.write_bytes(path.read_bytes()[:1024] + tokens[3].tobytes())
    other = ShardLoader(pattern, GLOBAL_BATCH, T)
    with pytest.raises(BadInput, match="of the same lengths with other tokens than --input_bin has"):
        other.load_state_dict(state)
    del state["digest"]
    other.load_state_dict(state)


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_more_shards_than_files_may_be_open(tmp_path, shuffle_seed):
    pattern, shards = write_shards(tmp_path, [21] * 60)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        loader = ShardLoader(pattern, 1, 20, shuffle_seed=shuffle_seed)
        read = [loader.next_batch()[0][0].tolist() for _ in range(2 * len(shards))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(read) == sorted(2 * [shard[:20].tolist() for shard in shards])


@pytest.mark.parametrize("steps", [1, 3, ROUND_TRIP - 1, ROUND_TRIP, ROUND_TRIP + 4])
def test_reset_returns_to_the_first_token(corpus, steps):
    loader = ranks(corpus[0], 2)[1]
    first = [loader.next_batch() for _ in range(2)]
    for _ in range(steps):
        loader.next_batch()
    loader.reset()
    assert all(same(loader.next_batch(), batch) for batch in first)


@worlds
def test_shard_too_small_for_one_window_of_all_ranks(tmp_path, world):
    needed = world * 2 * T + 1
    pattern, _ = write_shards(tmp_path, [needed, needed - 1])
    with pytest.raises(BadInput, match=f"train_000001.bin: {needed - 1} tokens are fewer than the {needed} ="):
        ranks(pattern, world, batch_size=2)
    (tmp_path / "train_000001.bin").unlink()
    assert len(step(ranks(pattern, world, batch_size=2))[0]) == 2 * world


@pytest.mark.parametrize("at", [0, 63, 64, 200, 202])
def test_token_id_that_the_model_does_not_know(tmp_path, monkeypatch, at):
    """The first shard is looked through at the start, the second when it is its turn: at once would take minutes."""
    monkeypatch.setattr(data.loader, "SCAN_BLOCK", 64)
    pattern, _ = write_shards(tmp_path, [41, 203], vocab_size=60)
    file = tmp_path / "train_000001.bin"
    content = bytearray(file.read_bytes())
    content[1024 + 2 * at : 1024 + 2 * at + 2] = struct.pack("<H", 60)
    file.write_bytes(content)

    assert len(step(ranks(pattern, 1, vocab_size=61))[0]) == GLOBAL_BATCH
    loader = ShardLoader(pattern, GLOBAL_BATCH, T, vocab_size=60)
    loader.next_batch()
    with pytest.raises(BadInput, match=rf"train_000001.bin: token {at} has the id 60, and the model knows 60 ids"):
        loader.next_batch()
    (tmp_path / "train_000000.bin").unlink()
    with pytest.raises(BadInput, match=rf"train_000001.bin: token {at} has the id 60"):
        ShardLoader(pattern, GLOBAL_BATCH, T, vocab_size=60)
