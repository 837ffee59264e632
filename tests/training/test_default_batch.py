"""The batch that a GPU gets where no flag gives one."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train
from data.shards import write_shard
from kernels.ops import EAGER, Ops
from model.gpt import PRESETS
from tests.conftest import TRITON
from training import distributed, memory
from training.config import Config, parse
from training.distributed import World

ON_GPU = World(0, 0, 1, torch.device("cuda", 0), False)


def network(preset: str, ops: Ops = TRITON) -> Any:
    """As much of a network as is asked for."""
    return SimpleNamespace(config=PRESETS[preset], ops=ops)


@pytest.fixture
def gpu_of(monkeypatch):
    """Make every GPU one of so many GB."""

    def gpu(gigabytes: float) -> None:
        properties = SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return gpu


@pytest.fixture
def batch_on(gpu_of):
    """The batch_size on a GPU of so many GB."""

    def batch(gigabytes: float, config: Config, ops: Ops = TRITON, world: World = ON_GPU) -> int:
        gpu_of(gigabytes)
        return memory.largest_batch(config, world, network(config.model, ops))

    return batch


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Shards that hold any batch."""
    write_shard(tmp_path / "train.bin", np.zeros(2**22, np.uint16))
    return ["--input_bin", str(tmp_path / "train.bin")]


@pytest.mark.parametrize(
    ("model", "of_16_gb", "of_24_gb", "of_80_gb"),
    [("d12", 16, 32, 64), ("d24", 4, 8, 32), ("d36", 1, 1, 16), ("d48", 1, 1, 8)],
)
def test_batch_follows_memory_and_leaves_some(batch_on, flags, model, of_16_gb, of_24_gb, of_80_gb):
    config = parse([*flags, "--model", model]).resolved("cuda")
    for gigabytes, want in ((16, of_16_gb), (24, of_24_gb), (80, of_80_gb)):
        assert batch_on(gigabytes, config) == want
        counted = memory.training_bytes(PRESETS[model], TRITON, want, 1024, "bfloat16")
        assert want == 1 or counted < 0.9 * gigabytes * 1e9


def test_batch_follows_backend_and_dtype(batch_on, flags):
    config = parse(flags).resolved("cuda")
    assert batch_on(80, config, EAGER) == 16  # it fits 80 GB at 32, and then leaves a tenth alone
    assert batch_on(80, parse([*flags, "--dtype", "float32"]).resolved("cuda")) == 64 // 2


def test_batch_follows_the_data(batch_on, flags, tmp_path):
    """Eight batches in the training data, and one in each shard."""
    for name, length in (("small", 8 * 1024 * 4), ("val", 1024 * 2 + 1), ("smallest", 1024)):
        write_shard(tmp_path / f"{name}.bin", np.zeros(length, np.uint16))
    config = parse(["--input_bin", str(tmp_path / "small.bin")]).resolved("cuda")
    assert batch_on(80, config) == 4
    config = parse([*flags, "--input_val_bin", str(tmp_path / "val.bin")]).resolved("cuda")
    assert batch_on(80, config) == 2
    assert batch_on(80, config, world=dataclasses.replace(ON_GPU, size=2)) == 1
    config = parse([*flags, "--input_val_bin", str(tmp_path / "smallest.bin")]).resolved("cuda")
    assert batch_on(80, config) == 1  # the loader then says what is wrong


def test_ranks_take_the_batch_of_the_smallest_gpu(batch_on, flags, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda world, batch: [batch, 16])
    assert batch_on(80, parse(flags).resolved("cuda")) == 16


def test_the_first_command_on_a_gpu(gpu_of, monkeypatch):
    """As it is resolved: the embedded corpus holds eight batches of 8 × 1024 tokens."""
    monkeypatch.setattr(train, "ShardLoader", lambda *args, **options: SimpleNamespace(repeated=lambda *_: None))
    found = set()
    for gigabytes in (16, 24, 80):
        gpu_of(gigabytes)
        config, *_ = train.open_data(parse([]).resolved("cuda"), ON_GPU, network("d12"))
        found.add((config.model, config.batch_size, config.total_batch_size, config.dtype, config.shuffle))
    assert found == {("d12", 8, 8192, "bfloat16", 1)}
