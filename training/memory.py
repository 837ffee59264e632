"""What a training step needs of a GPU's memory, and so which batch fits."""

import torch

from data.shards import shard_lengths
from kernels.ops import EAGER, Ops
from model.gpt import GPT, GPTConfig
from training import distributed
from training.config import Config
from training.distributed import World

SHARE = 0.6
"""of a GPU's memory that a default batch may take: CUDA itself, fragments and validation need some too"""


def training_bytes(network: GPTConfig, ops: Ops, batch_size: int, sequence_length: int, dtype: str) -> int:
    """Most bytes alive in a step: weights, gradients and AdamW's moments, and what grows with the tokens.

    The coefficients are fitted to what `python -m tests.budgets` counts of the presets, and are off by at most 4%.

    Args:
        network: the shape.
        ops: the backend. Eager ops save more, and eager logits are all alive.
        batch_size: B, sequences in a micro-batch.
        sequence_length: T, tokens in a sequence.
        dtype: float32, float16 or bfloat16.
    """
    C, L = network.n_embd, network.n_layer
    per_token = 31 * C + L * 36 * C
    if ops.gelu is EAGER.gelu:
        per_token = 12 * network.vocab_size + L * 85 * C
    if ops.attention is EAGER.attention:
        per_token += L * 6 * network.n_head * sequence_length
    width = 2 if dtype == "float32" else 1
    return 15 * network.num_params() + width * batch_size * sequence_length * per_token


def batch_in_memory(network: GPTConfig, ops: Ops, sequence_length: int, dtype: str, available: float) -> int:
    """The largest power of two of sequences that takes at most SHARE of the `available` bytes; 1 if none does."""
    B = 1
    while training_bytes(network, ops, 2 * B, sequence_length, dtype) <= SHARE * available:
        B *= 2
    return B


def largest_batch(config: Config, world: World, gpt: GPT) -> int:
    """The batch_size of a GPU where none is given: a power of two that fits its memory, of which each shard holds a
    batch of all ranks, and the training data eight. The same on every rank, also where GPUs differ."""
    train, val = (shard_lengths(pattern) if pattern else [] for pattern in (config.input_bin, config.input_val_bin))
    tokens = min(sum(train) // 8, *(length - 1 for length in (*train, *val)))
    by_data = max(1, tokens // (config.sequence_length * world.size))
    available = torch.cuda.get_device_properties(world.device).total_memory
    by_memory = batch_in_memory(gpt.config, gpt.ops, config.sequence_length, config.dtype, available)
    return min(1 << by_data.bit_length() - 1, *distributed.gather(world, by_memory))
