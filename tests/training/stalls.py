"""`python -m tests.training.stalls`: what a checkpoint costs training, on this machine's CPU.

A network of at least 100 million parameters is trained on one core, so that the background has another. Measured: a
step without a save; a save that is waited for; how long a save that is not waited for holds up the loop, while memory
is copied; and by how much the steps are slower that run while it is being written.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from bench.tables import table
from data.loader import ShardLoader
from data.prepare import prepare_pydoc
from model.gpt import GPT, PRESETS
from training import optim
from training.checkpoint import Checkpoints, TrainState
from training.config import Config
from training.distributed import World
from training.faults import UpdateGuard
from training.step import autocast_to, training_step

SHAPE = (2, 64)  # sequences and tokens of a step


def measure(model: str, saves: int, folder: Path) -> dict[str, float]:
    """Train a preset, save so many times in either way, and give medians over the saves, in seconds."""
    torch.set_num_threads(1)
    gpt = GPT(PRESETS[model])
    optimizer = optim.build(gpt, Config(learning_rate=1e-4))
    loader = ShardLoader(str(prepare_pydoc() / "train_*.bin"), *SHAPE)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    params, device = dict(gpt.named_parameters()), torch.device("cpu")
    state = TrainState(gpt, params, optimizer, scaler, loader, UpdateGuard(), device)
    checkpoints = Checkpoints(folder, World(0, 0, 1, device, distributed=False), {}, keep=1)

    def step() -> float:
        started = time.perf_counter()
        training_step(gpt, optimizer, [loader.next_batch()], autocast_to(torch.float32, device))
        state.step += 1
        return time.perf_counter() - started

    checkpoints.warm_up(state)
    alone = median([step() for _ in range(8)][2:])
    waited, held, slower, behind = [], [], [], []
    for _ in range(saves):
        started = time.perf_counter()
        checkpoints.save(state)
        checkpoints.wait()
        waited.append(time.perf_counter() - started)
        step()
        started = time.perf_counter()
        checkpoints.save(state)
        held.append(time.perf_counter() - started)
        meanwhile = []
        while checkpoints.saving:
            meanwhile.append(step())
            checkpoints.poll()
        slower.append(sum(seconds - alone for seconds in meanwhile))
        behind.append(len(meanwhile))
        step()
    return {
        "a step without a save": alone,
        "a save that is waited for": median(waited),
        "the loop is held up by a save in the background": median(held),
        "steps made while it is written": median(behind),
        "what these take longer, together": median(slower),
    }


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser("python -m tests.training.stalls", description="What a checkpoint costs training.")
    parser.add_argument("--model", default="d12", choices=PRESETS, help="A preset (default: d12).")
    parser.add_argument("--saves", type=int, default=5, help="How many of each kind (default: 5).")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args.model, args.saves, Path(folder))
    print(f"{args.model}: {PRESETS[args.model].num_params():,} parameters, 1 of {os.cpu_count()} cores\n")
    print(table(("", "median"), [(name, value) for name, value in figures.items()]))


if __name__ == "__main__":
    main()
