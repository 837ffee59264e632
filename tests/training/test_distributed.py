"""Two gloo ranks against one process on the same global batch."""

import pytest

from model import llmc
from tests.conftest import TINY

FLAGS = {"total_batch_size": 256, "weight_decay": 0.1, "grad_clip": 0.7, "val_loss_every": 5, "val_max_steps": 4}


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_two_ranks_train_like_one(run_tiny, torchrun_tiny, zero_stage):
    one = run_tiny(**FLAGS, batch_size=8)  # what two ranks read in batches of 4, one process reads in batches of 8
    two = torchrun_tiny(2, **FLAGS, zero_stage=zero_stage)  # 4 sequences a rank, two micro-steps
    assert len(two.metrics) == 5
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        for key in ("loss", "norm", "lr", "tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    weights, reference = llmc.load_model(two.output_dir).state_dict(), llmc.load_model(one.output_dir).state_dict()
    for name, weight in reference.items():
        difference = weights[name] - weight
        if name.endswith("c_attn.bias"):
            # Softmax does not see the keys' bias: its gradient is mere rounding, which Adam takes for a direction.
            difference[TINY.n_embd : 2 * TINY.n_embd] = 0
        assert difference.norm() <= 1e-5 * weight.norm(), name
    losses = [[float(line.split("tel:")[1]) for line in run.log if "tel" in line] for run in (one, two)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_screen_is_written_once(torchrun_tiny):
    run = torchrun_tiny(2, num_iterations=2)
    assert run.screen.count("| train loss") == 2
    assert "2 ranks × 1 micro-steps = 128 tokens" in run.screen
