"""The optimiser and its learning rate."""

import math

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from training.config import Config

BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(step: int, config: Config) -> float:
    """Linear warmup, then a cosine to learning_rate·learning_rate_decay_frac (Loshchilov & Hutter 2016,
    https://arxiv.org/abs/1608.03983, without restarts).

    Args:
        step: the update that is about to be made, from 0.
        config: learning_rate, learning_rate_decay_frac, warmup_iters and num_iterations are read.

    Returns:
        The learning rate of that update.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.learning_rate_decay_frac
    if step < config.warmup_iters:
        return peak * (step + 1) / config.warmup_iters
    if step >= config.num_iterations:
        return floor
    progress = (step - config.warmup_iters) / (config.num_iterations - config.warmup_iters)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters: tensors of two or more dimensions decay, biases and LayerNorms do not.

    Returns:
        Two groups for a torch optimiser, the decaying one first.
    """
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def build(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101), fused on CUDA; at ZeRO stage 1 each rank keeps the state of a part of
    the parameters (https://arxiv.org/abs/1910.02054)."""
    groups = parameter_groups(model, config.weight_decay)
    on_cuda = groups[0]["params"][0].is_cuda
    options = {"lr": config.learning_rate, "betas": BETAS, "eps": EPS, "fused": on_cuda}
    if config.zero_stage == 1:
        return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)
