"""The parts of a training step, without a loop."""

import copy

import torch

from model.gpt import GPT
from tests.conftest import TINY
from training import optim
from training.config import Config
from training.step import autocast_to, clip, forward_backward, training_step

TOKENS = torch.randint(TINY.vocab_size, (6, 17), generator=torch.Generator().manual_seed(4))
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]
NO_AUTOCAST = autocast_to(torch.float32, X.device)


def test_gradients_are_the_mean_over_micro_batches_and_no_more_of_them_are_read():
    gpt, whole = GPT(TINY), GPT(TINY)
    read: list[int] = []
    batches = ((read.append(i), (X[i : i + 2], Y[i : i + 2]))[1] for i in (0, 2, 4))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    loss = forward_backward(gpt, batches, 2, NO_AUTOCAST, scaler)
    assert read == [0, 2] and not loss.requires_grad
    want = whole(X[:4], Y[:4], return_logits=False)[1]
    want.backward()
    torch.testing.assert_close(loss, want.detach())
    optimizer = optim.build(gpt, Config(learning_rate=1e-3))
    norm = clip(gpt.parameters(), optimizer, scaler, max_norm=0.5)
    torch.testing.assert_close(norm, torch.stack([p.grad.norm() for p in whole.parameters()]).norm())
    assert norm > 0.5
    for ours, theirs in zip(gpt.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad * 0.5 / norm, rtol=1e-4, atol=1e-7)


def test_without_a_backward_pass_there_is_the_loss_alone():
    gpt = GPT(TINY)
    loss = forward_backward(gpt, [(X, Y)], 1, NO_AUTOCAST, torch.amp.GradScaler(enabled=False), backward=False)
    assert torch.equal(loss, gpt(X, Y, return_logits=False)[1])
    assert all(p.grad is None for p in gpt.parameters())


def test_training_step_is_adamw_on_the_clipped_gradient():
    ours = GPT(TINY)
    theirs = copy.deepcopy(ours)
    config = Config(learning_rate=1e-2, weight_decay=0.1)
    optimizer, plain = optim.build(ours, config), optim.build(theirs, config)
    for _ in range(2):
        loss = training_step(ours, optimizer, [(X, Y)], autocast_to(torch.bfloat16, X.device), grad_clip=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            want = theirs(X, Y, return_logits=False)[1]
        want.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        plain.step()
        plain.zero_grad()
        assert torch.equal(loss, want)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None
