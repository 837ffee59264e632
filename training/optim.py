"""The optimiser and its learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from training.config import Config
from training.distributed import full
from training.sharded_adamw import ShardedAdamW

BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(step: int, config: Config) -> float:
    """Linear warmup, then a cosine to learning_rate·learning_rate_decay_frac (Loshchilov & Hutter 2016,
    https://arxiv.org/abs/1608.03983, without restarts).

    Args:
        step: updates done before this one.
        config: of which learning_rate, learning_rate_decay_frac, warmup_iters and num_iterations are read.

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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update, rounded to fp32: a CUDA graph reads it from memory, where torch's AdamW
    takes fp32 alone, and must not change a bit."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float32).item()


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
    """AdamW (https://arxiv.org/abs/1711.05101), in its fused form; at ZeRO stage 1 each rank keeps a shard of its
    state."""
    groups = parameter_groups(model, config.weight_decay)
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": BETAS, "eps": EPS, "fused": True}
    if config.zero_stage == 1:
        return ShardedAdamW(groups, **options)
    return torch.optim.AdamW(groups, **options)


def adamw_state(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """AdamW's step, exp_avg and exp_avg_sq of each parameter, or this rank's shards of them.

    AdamW creates them at its first update. Missing ones are created here in the same way, so that they can be saved
    before that, and loaded into.
    """
    adamw = optimizer.adamw if isinstance(optimizer, ShardedAdamW) else optimizer
    for group in adamw.param_groups:
        for p in group["params"]:
            if p not in adamw.state:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                moments = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
                adamw.state[p] = {"step": step, **moments}
    return optimizer.sharded_state() if isinstance(optimizer, ShardedAdamW) else adamw.state


def clip_gradients(params: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a norm of at most `max_norm` (0: no limit), over all parameters and all of their shards.

    Returns:
        () the norm before, bitwise identical on every rank. Every rank has to call this.
    """
    params = list(params)
    norm = full(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(params, max_norm or float("inf"), norm)
    return norm


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, accepted: bool) -> None:
    """Update the weights with the unscaled gradients, or skip that, and free the gradients.

    float16's loss scale falls if gradients were not finite, on this rank or, if they are sharded, on any.
    """
    if accepted:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
