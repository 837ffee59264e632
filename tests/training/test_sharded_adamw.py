"""ZeRO stage 1: AdamW in shards makes the updates of AdamW."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.gpt import GPT
from tests.conftest import TINY
from tests.training.conftest import assert_weights_agree, same_weights
from training import optim, sharded_adamw
from training.config import Config
from training.distributed import full
from training.sharded_adamw import ShardedAdamW
from training.step import autocast_to, training_step


def small_buckets(rank: int) -> None:
    """So that the tiny network's weights travel in several messages."""
    sharded_adamw.BUCKET_BYTES = 2**14


@pytest.mark.parametrize("ranks", [2, 3])
def test_stages_0_and_1_make_the_same_updates(run_ranks, ranks):
    """To the bit, but that three ranks divide no dimension of the network: their shares are no multiples of 16, and on
    a CPU torch's fused AdamW rounds what is left over in another way."""
    flags = {
        "num_iterations": 5,
        "batch_size": 2,
        "total_batch_size": ranks * 32,
        "warmup_iters": 3,
        "weight_decay": 0.1,
    }
    plain, sharded = (run_ranks(ranks, small_buckets, zero_stage=stage, **flags) for stage in (0, 1))
    assert sharded.losses == pytest.approx(plain.losses, rel=0 if ranks == 2 else 1e-6)
    if ranks == 2:
        assert sharded.log == plain.log and same_weights(sharded, plain)
    else:
        assert_weights_agree(sharded, plain, 1e-5)


@pytest.fixture
def one_rank():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", [False, True])
def test_options_and_rates_reach_adamw(one_rank, fused):
    ours = GPT(TINY)
    theirs = copy.deepcopy(ours)
    options = {"lr": 1.0, "betas": (0.8, 0.9), "eps": 1e-3, "fused": fused}
    sharded = ShardedAdamW(optim.parameter_groups(ours, 0.1), **options)
    plain = torch.optim.AdamW(optim.parameter_groups(theirs, 0.1), **options)
    tokens = torch.randint(TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(4))
    for step in range(3):
        for network, optimizer in ((ours, sharded), (theirs, plain)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            training_step(network, optimizer, [(tokens, tokens)], autocast_to(torch.float32, tokens.device))
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    state = optim.adamw_state(sharded)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert state[p]["step"] == 3
        for kind in ("exp_avg", "exp_avg_sq"):
            assert state[p][kind].shape == p.shape
            assert torch.equal(full(state[p][kind]), plain.state[q][kind])


def test_state_is_there_before_the_first_update(one_rank):
    gpt = GPT(TINY)
    state = optim.adamw_state(optim.build(gpt, Config(learning_rate=1e-3, zero_stage=1)))
    assert state.keys() == set(gpt.parameters())
    assert all(moments["step"] == 0 and not full(moments["exp_avg"]).any() for moments in state.values())


@pytest.mark.parametrize(("rows", "ranks"), [(61, 3), (8, 2), (3, 4), (5, 4), (1, 1)])
def test_rows_are_cut_as_a_sharded_tensor_has_them(rows, ranks):
    tensor = torch.arange(2.0 * rows).view(rows, 2)
    parts = [sharded_adamw._rows(tensor, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), tensor)
    sizes = [Shard.local_shard_size_and_offset(rows, ranks, rank)[0] for rank in range(ranks)]
    assert [len(part) for part in parts] == sizes
    assert all(part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for part in parts)


def test_buckets_hold_all_in_order(monkeypatch):
    monkeypatch.setattr(sharded_adamw, "BUCKET_BYTES", 40)
    params = [torch.zeros(n) for n in (4, 6, 1, 30, 2, 8)]
    assert [[len(p) for p in bucket] for bucket in sharded_adamw._buckets(params)] == [[4, 6], [1], [30], [2, 8]]
