"""One training step in three parts, between which the loop in train.py agrees with the other ranks and decides: forward
and backward over the micro-batches, the clip, the update. `training_step` makes all three, for code without a loop."""

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch

from training import distributed, optim

Batch = tuple[torch.Tensor, torch.Tensor]
"""(inputs, targets), each (B, T) int64"""


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context of forward passes: autocast to `dtype`, which does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def forward_backward(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    grad_accum_steps: int,
    autocast: AbstractContextManager,
    scaler: torch.amp.GradScaler,
    zero_stage: int = 0,
    backward: bool = True,
) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over the micro-batches. Ranks average it in the last one.

    Args:
        model: the network, or what DDP, FSDP2 or torch.compile made of it.
        batches: so many are read, each when its turn comes.
        grad_accum_steps: number of micro-batches.
        autocast: from `autocast_to`.
        scaler: multiplies the losses of float16.
        zero_stage: how the model is sharded.
        backward: False for the loss alone.

    Returns:
        () the mean loss of this rank in nats, without a graph.
    """
    losses = []
    for micro_step, (x, y) in zip(range(grad_accum_steps), batches, strict=False):
        distributed.synchronise_gradients(model, micro_step == grad_accum_steps - 1, zero_stage)
        with torch.set_grad_enabled(backward), autocast:
            _, loss = model(x, y, return_logits=False)
            loss = loss / grad_accum_steps  # so that gradients are the mean over the whole batch
        losses.append(loss.detach())
        if backward:
            scaler.scale(loss).backward()
    return functools.reduce(torch.add, losses)


def clip(
    params: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float
) -> torch.Tensor:
    """Undo the scale of the gradients, then see `optim.clip_gradients`."""
    scaler.unscale_(optimizer)
    return optim.clip_gradients(params, max_norm)


def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    autocast: AbstractContextManager,
    grad_clip: float = 1.0,
) -> torch.Tensor:
    """Forward, backward, clip and update, without a loss scale. See `forward_backward`, also for what is returned."""
    scaler = torch.amp.GradScaler(enabled=False)
    loss = forward_backward(model, batches, len(batches), autocast, scaler)
    clip(model.parameters(), optimizer, scaler, grad_clip)
    optim.update(optimizer, scaler, accepted=True)
    return loss
