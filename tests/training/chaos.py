"""`python -m tests.training.chaos`: kill -9 at random moments, and see that nothing is lost.

A tiny network is trained on gloo ranks. Again and again one rank, or all of them, are killed: while they start, in a
step, or inside a save. After each kill every visible checkpoint has to be intact, the remaining ranks have to end by
themselves and say who is gone, and `--resume auto` has to resume from the newest. The log and the weights of a run that
reaches its end have to be bitwise identical to those of one that was never killed. The moments are drawn from a seed.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from data.shards import write_shard
from model.gpt import GPT
from model.llmc import write_model
from tests.conftest import TINY, command_line
from tests.training import ranks
from training import checkpoint

STEPS = 60


def chaos(folder: Path, kills: int, seed: int, n_ranks: int, zero_stage: int) -> Counter:
    """Kill so many times, with the runs in an empty folder, and check all of the above.

    Returns how many kills there were of each kind, and how many runs ended.
    """
    arguments = _arguments(folder, n_ranks, zero_stage)
    reference = folder / "never_killed"
    never_killed = ranks.start(n_ranks, [*arguments, "--output_dir", str(reference)], folder / "screen")
    assert set(never_killed.wait(120)) == {0}, never_killed.errors
    draw, run = random.Random(seed), folder / "run_0"
    counts: Counter[str] = Counter()
    while True:
        newest = next(iter(checkpoint.find(run / checkpoint.FOLDER)), None)
        attempt = ranks.start(n_ranks, [*arguments, "--output_dir", str(run)], folder / "screen")
        kind = draw.choice(("start", "step", "save", "save")) if counts["kills"] < kills else "none"
        victims = draw.choice((range(n_ranks), [draw.randrange(n_ranks)]))
        killed = _kill_when(attempt, run, kind, victims, draw)
        statuses = attempt.wait(60)
        resumed = f"resumed from {newest}:" in attempt.screen
        assert resumed or newest is None or "step " not in attempt.screen, f"not resumed from {newest}"
        for folder_there in checkpoint.find(run / checkpoint.FOLDER):
            assert checkpoint.verify(folder_there) is None, checkpoint.verify(folder_there)
        if killed:
            counts.update(["kills", f"in a {kind}", "of all ranks" if len(victims) == n_ranks else "of one rank"])
            left = [rank for rank in range(n_ranks) if rank not in victims]
            assert all(statuses[rank] in (0, 1) for rank in left), f"{statuses}: {attempt.errors}"
            told = f"rank {victims[0]} is gone" in attempt.errors or "not all came" in attempt.errors
            assert told or not any(statuses[rank] for rank in left), (
                f"nobody said that rank {victims[0]} is gone: {attempt.errors}"
            )
            print(f"kill {counts['kills']:>3}: {kind:5} ranks {list(victims)}, checkpoint {newest and newest.name}")
        elif set(statuses) == {0}:
            counts["runs ended"] += 1
            for name in ("model.bin", "main.log"):
                assert (run / name).read_bytes() == (reference / name).read_bytes(), f"{run / name} differs"
            if counts["kills"] >= kills:
                return counts
            run = folder / f"run_{counts['runs ended']}"
        else:
            raise AssertionError(f"{statuses} without a kill: {attempt.errors}")


def _arguments(folder: Path, n_ranks: int, zero_stage: int) -> list[str]:
    """What is trained: a network and a random walk over its vocabulary, both written here."""
    write_model(folder / "gpt2_tiny.bin", GPT(TINY))
    random_walk = np.cumsum(np.random.default_rng(7).integers(-2, 3, 5003)) % TINY.vocab_size
    write_shard(folder / "train_0.bin", random_walk.astype(np.uint16))
    flags = {
        "model": folder / "gpt2_tiny.bin",
        "input_bin": folder / "train_0.bin",
        "device": "cpu",
        "batch_size": 4,
        "sequence_length": 16,
        "total_batch_size": 4 * 16 * n_ranks * 2,  # two micro-steps
        "num_iterations": STEPS,
        "shuffle": 1,
        "zero_stage": zero_stage,
        "checkpoint_every": 5,
        "resume": "auto",
        "timeout_s": 10,
    }
    return command_line({f"--{name}": value for name, value in flags.items()})


def _kill_when(attempt: ranks.Ranks, run: Path, kind: str, victims, draw: random.Random) -> bool:
    """Wait for a moment of this kind, and kill; False where all ranks ended before it came."""
    if kind == "none":
        return False
    lines = _lines(run)
    waits = {"start": draw.uniform(0.1, 3.0), "step": draw.uniform(0.0, 0.05), "save": draw.uniform(0.0, 0.03)}
    steps, saves = draw.randint(1, 25), draw.randint(1, 4)
    parts: set[str] = set()
    while kind != "start":
        parts |= {path.name for path in (run / checkpoint.FOLDER).glob(".step_*.part")}
        if (kind == "step" and _lines(run) - lines >= steps) or (kind == "save" and len(parts) >= saves):
            break
        if all(process.exitcode is not None for process in attempt.processes):
            return False
        time.sleep(0.001)
    time.sleep(waits[kind])
    alive = [rank for rank in victims if attempt.processes[rank].exitcode is None]
    for rank in alive:
        attempt.processes[rank].kill()
    return len(alive) == len(victims)


def _lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser("python -m tests.training.chaos", description="Kill -9 at random moments.")
    parser.add_argument("--kills", type=int, default=50, help="How many (default: 50).")
    parser.add_argument("--seed", type=int, default=1, help="Of the moments (default: 1).")
    parser.add_argument("--ranks", type=int, default=2, help="How many gloo ranks (default: 2).")
    parser.add_argument("--zero_stage", type=int, default=1, choices=(0, 1, 2, 3), help="How they share (default: 1).")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = chaos(Path(folder), args.kills, args.seed, args.ranks, args.zero_stage)
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{told}; all that ended have the log and the weights of the run that was never killed")
    print(f"{args.ranks} ranks, stage {args.zero_stage}, seed {args.seed}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
