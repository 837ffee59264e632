"""One training step in three parts, between which the loop in train.py agrees with the other ranks and decides: forward
and backward over the micro-batches, the clip, the update. `training_step` makes all three, for code without a loop."""

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch

from training import distributed, optim
from training.checkpoint import TrainState
from training.config import Config
from training.distributed import World

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


class Update:
    """The updates of a run, each in two parts. Between them the loop agrees with the other ranks, and decides.

    Args:
        config: the flags.
        world: the ranks.
        state: of which parameters, optimizer and loss scale are changed.
        model: as in `forward_backward`.
    """

    def __init__(self, config: Config, world: World, state: TrainState, model: torch.nn.Module):
        self.config, self.state, self.model = config, state, model
        self.autocast = autocast_to(getattr(torch, config.dtype), world.device)
        self.grad_accum_steps = config.grad_accum_steps(world.size)

    def gradients(self, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of the next micro-batches and clip them; with `--inference_only 1`, the loss alone.

        Returns:
            () the mean loss of this rank in nats, and () the norm of all gradients before they are clipped, or 0. The
            next call may overwrite both.
        """
        config, state, trains = self.config, self.state, not self.config.inference_only
        loss = forward_backward(
            self.model, batches, self.grad_accum_steps, self.autocast, state.scaler, config.zero_stage, backward=trains
        )
        if not trains:
            return loss, torch.zeros_like(loss)
        return loss, clip(state.params.values(), state.optimizer, state.scaler, config.grad_clip)

    def apply(self, lr: float, accepted: bool) -> None:
        """Update the weights with these gradients, or skip that. See `optim.update`."""
        optim.set_learning_rate(self.state.optimizer, lr)
        optim.update(self.state.optimizer, self.state.scaler, accepted)


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
