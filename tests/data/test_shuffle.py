"""`--shuffle 1`: every sequence once an epoch, in an order that only (seed, epoch) decides."""

import itertools

import numpy as np
import pytest
import torch

from common import BadInput
from data.loader import ShardLoader
from data.shards import write_shard

T = 5
LENGTHS = [97, 81, 80, 160, 509]
SEQUENCES = sum((length - 1) // T for length in LENGTHS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards whose tokens all differ, so that a sequence tells where it is from."""
    folder = tmp_path_factory.mktemp("shuffled")
    tokens = np.random.default_rng(4).permutation(sum(LENGTHS)).astype(np.uint16)
    shards = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    for index, shard in enumerate(shards):
        write_shard(folder / f"train_{index}.bin", shard)
    return str(folder / "train_*.bin"), shards


def loaders(pattern, world=1, batch_size=2, seed=42):
    return [ShardLoader(pattern, batch_size, T, rank, world, shuffle_seed=seed) for rank in range(world)]


def sequences(ranks, n: int) -> list[tuple[int, ...]]:
    """The next n sequences of T + 1 tokens that all ranks read together, in order."""
    read = []
    while len(read) < n:
        for loader in ranks:
            x, y = loader.next_batch()
            assert x.shape == y.shape and torch.equal(x[:, 1:], y[:, :-1])
            assert x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype == torch.int64
            read += [tuple(row) for row in torch.cat([x, y[:, -1:]], dim=1).tolist()]
    return read[:n]


def on_disk(shards) -> list[list[tuple[int, ...]]]:
    return [[tuple(shard[i * T : (i + 1) * T + 1].tolist()) for i in range((len(shard) - 1) // T)] for shard in shards]


def test_every_epoch_has_every_sequence_once_in_an_order_of_its_own(corpus):
    pattern, shards = corpus
    read = sequences(loaders(pattern), 3 * SEQUENCES)
    epochs = [read[i * SEQUENCES : (i + 1) * SEQUENCES] for i in range(3)]
    there = list(itertools.chain(*on_disk(shards)))
    for epoch in epochs:
        assert sorted(epoch) == sorted(there) and epoch != there
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_shards_are_permuted_and_read_one_after_the_other(corpus):
    pattern, shards = corpus
    shard_of = {sequence: i for i, shard in enumerate(on_disk(shards)) for sequence in shard}
    orders = []
    read = sequences(loaders(pattern), 4 * SEQUENCES)
    for epoch in range(4):
        turns = [shard_of[sequence] for sequence in read[epoch * SEQUENCES : (epoch + 1) * SEQUENCES]]
        order = [shard for shard, _ in itertools.groupby(turns)]
        assert sorted(order) == list(range(len(LENGTHS)))  # each comes up once, as a whole
        orders.append(order)
    assert len(set(map(tuple, orders))) > 1


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 3), (8, 2)])
def test_order_is_the_same_for_any_number_of_ranks(corpus, world, batch_size):
    one = sequences(loaders(corpus[0]), 2 * SEQUENCES + 7)
    assert sequences(loaders(corpus[0], world, batch_size), 2 * SEQUENCES + 7) == one


def test_order_follows_the_seed(corpus):
    first = [sequences(loaders(corpus[0], seed=seed), 40) for seed in (42, 42, 43)]
    assert first[0] == first[1] != first[2]


def test_restored_after_any_batch_by_any_number_of_ranks(corpus):
    pattern, _ = corpus
    whole = sequences(loaders(pattern), 3 * SEQUENCES)
    two, others = loaders(pattern, 2), {world: loaders(pattern, world, 1) for world in (1, 2, 4)}
    for at in range(4, 2 * SEQUENCES, 4):
        for loader in two:
            loader.next_batch()
        states = [loader.state_dict() for loader in two]
        assert states[0] == states[1] and states[0]["sequence"] == at
        for ranks in others.values():
            for loader in ranks:
                loader.load_state_dict(states[0])
            assert sequences(ranks, 9) == whole[at : at + 9]


def test_reset_and_where(corpus):
    pattern, shards = corpus
    (loader,) = loaders(pattern)
    first = sequences([loader], 2)
    assert " in the order of epoch 0" in loader.where()
    sequences([loader], SEQUENCES)
    where = loader.where()
    (next_one,) = sequences([loader], 1)
    file, index = where.split(" from sequence ")[0], int(where.split(" from sequence ")[1].split()[0])
    shard = shards[[str(path) for path in loader.files].index(file)]
    assert next_one == tuple(shard[index * T : (index + 1) * T + 1].tolist()) and where.endswith("epoch 1")
    loader.reset()
    assert sequences([loader], 2) == first


def test_position_in_another_order_is_refused(corpus):
    (shuffled,) = loaders(corpus[0])
    in_order = ShardLoader(corpus[0], 2, T)
    with pytest.raises(BadInput, match="is of --shuffle 1"):
        in_order.load_state_dict(shuffled.state_dict())
    with pytest.raises(BadInput, match="is of --shuffle 0"):
        shuffled.load_state_dict(in_order.state_dict())


def test_permutation_is_frozen(corpus):
    """A run that is resumed with another version of numpy has to meet the same order."""
    (loader,) = loaders(corpus[0])
    assert loader._order(0).tolist() == [0, 3, 1, 4, 2]
    assert loader._order_within(3, 1).tolist() == [11, 12, 0, 10, 14, 3, 7, 4, 13, 2, 15, 6, 5, 8, 1, 9]
