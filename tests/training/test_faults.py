"""Faults: outliers, numbers that are not finite, ranks that die, hang or disagree, and kill -9."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data.loader import ShardLoader
from data.shards import write_shard
from model.gpt import GPT
from tests.conftest import command_line
from tests.training.chaos import chaos
from tests.training.conftest import after_each_step, everything_in, same_weights, weights_of
from training import optim
from training.distributed import RunStopped
from training.faults import MOST_SKIPPED, WINDOW, UpdateGuard

FLAGS = {"batch_size": 4, "total_batch_size": 256, "num_iterations": 8, "val_loss_every": 0}


def test_outlier_is_measured_against_the_last_128():
    """By the definition: standard deviations above the mean of a window that it is part of, once that is full."""
    draw = random.Random(5)
    losses = [draw.gauss(4, 0.1) for _ in range(400)]
    for at in (20, WINDOW + 40, 300):
        losses[at] = 5.0
    guard = UpdateGuard(loss_z=6.0)
    reasons = [guard.reason_to_skip(f"step {i}", loss, 1.0) for i, loss in enumerate(losses)]
    expected = set()
    for i in range(WINDOW - 1, len(losses)):
        window = np.array(losses[i - WINDOW + 1 : i + 1])
        if (losses[i] - window.mean()) / window.std() > 6.0:
            expected.add(i)
    assert {i for i, reason in enumerate(reasons) if reason} == expected == {WINDOW + 40, 300}
    assert guard.skipped == 2
    assert re.match(r"step 300: loss 5 is \d\.\d standard deviations above", reasons[300])


@pytest.mark.parametrize(("loss_z", "norm_z", "skips"), [(0, 0, 0), (5, 0, 1), (0, 5, 1), (5, 5, 2), (50, 50, 0)])
def test_each_limit_looks_at_its_own_value(loss_z, norm_z, skips):
    guard = UpdateGuard(loss_z, norm_z)
    draw = random.Random(6)
    for i in range(2 * WINDOW):
        guard.reason_to_skip("", 90.0 if i == 150 else draw.gauss(4, 0.1), 80.0 if i == 200 else draw.gauss(1, 0.1))
    assert guard.skipped == skips


def test_value_that_falls_is_no_outlier_and_one_that_is_constant_neither():
    guard = UpdateGuard(1.0, 1.0)
    assert not any(guard.reason_to_skip("", 4.0, 1.0) for _ in range(2 * WINDOW))
    assert guard.reason_to_skip("", 1.0, 0.5) is None


def test_values_that_are_not_finite_never_pass_and_too_many_in_a_row_stop():
    guard = UpdateGuard()
    for bad in ((math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)):
        for i in range(MOST_SKIPPED - 1):
            assert f"({i + 1} in a row" in guard.reason_to_skip("step 9, a file", *bad)
        assert guard.reason_to_skip("", 1.0, 1.0) is None
    assert guard.skipped == 3 * (MOST_SKIPPED - 1)
    assert all(math.isfinite(value) for window in guard.windows.values() for value in window)
    with pytest.raises(RunStopped, match="step 9, a file: loss is nan, as in the 19 steps before"):
        for _ in range(MOST_SKIPPED):
            guard.reason_to_skip("step 9, a file", math.nan, 1.0)


def test_guard_resumes_from_its_state():
    draw = random.Random(7)
    values = [(draw.gauss(4, 0.1), draw.gauss(1, 0.1)) for _ in range(300)]
    whole, first, second = (UpdateGuard(2.0, 2.0) for _ in range(3))
    reasons = [whole.reason_to_skip("", *pair) for pair in values]
    for pair in values[:140]:
        first.reason_to_skip("", *pair)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.reason_to_skip("", *pair) for pair in values[140:]] == reasons[140:]
    assert second.state_dict() == whole.state_dict() and any(reasons[140:])


def test_skipped_update_leaves_weights_and_moments(run_tiny, monkeypatch):
    """A run whose third update is refused, against one with a learning rate of its own that leaves that one out."""
    reason_to_skip, update, counted = UpdateGuard.reason_to_skip, optim.update, []

    def refuse_third(self, where, loss, norm):
        counted.append(where)
        return f"{where}: refused" if len(counted) == 3 else reason_to_skip(self, where, loss, norm)

    monkeypatch.setattr(UpdateGuard, "reason_to_skip", refuse_third)
    skipped = run_tiny(**FLAGS | {"num_iterations": 5})
    assert "step 3, " in skipped.screen

    counted.clear()

    def leave_out(optimizer, scaler, accepted):
        if len(counted) != 3:
            update(optimizer, scaler, True)
        optimizer.zero_grad()

    monkeypatch.setattr(optim, "update", leave_out)
    assert same_weights(run_tiny(**FLAGS | {"num_iterations": 5}), skipped)


def poison(rank: int, what: str) -> None:
    """NaN on the last rank: in step 3 in one micro-batch's loss or one gradient, or in all losses from step 4 on."""
    if rank == 0:
        return
    calls = []
    forward = GPT.forward

    def forward_with_nan(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        calls.append(loss)
        if (what == "loss" and len(calls) == 6) or (what == "all" and len(calls) > 6):
            loss = loss * torch.nan
        if what == "gradient" and len(calls) == 5:
            loss.register_hook(lambda grad: grad * torch.nan)
        return logits, loss

    GPT.forward = forward_with_nan


@pytest.mark.parametrize(("what", "zero_stage"), [("loss", 0), ("gradient", 1), ("gradient", 3)])
def test_nan_on_one_rank_is_skipped_on_all_and_named(run_ranks, tiny, what, zero_stage):
    run = run_ranks(2, poison, (what,), **FLAGS, zero_stage=zero_stage, check_ranks_every=2)  # they agree
    assert [line["skipped"] for line in run.metrics] == [0, 0, 1, 1, 1, 1, 1, 1]
    file = sorted(Path(tiny["--input_bin"]).parent.glob("train_*"))[0]
    (told,) = [line for line in run.screen.splitlines() if "update skipped" in line]
    assert told.startswith(f"step 3, {file} from token {2 * 256}: ") and "norm is nan" in told
    assert ("loss is nan" in told) == (what == "loss")
    assert all(weight.isfinite().all() for weight in weights_of(run).values())
    assert run.losses[-1] < 4.1  # it continues to learn


def test_run_that_is_not_finite_any_more_stops_and_leaves_the_last_good_checkpoint(start_ranks, run_ranks):
    flags = FLAGS | {"num_iterations": 4 + MOST_SKIPPED, "checkpoint_every": 2}
    processes, run = start_ranks(2, poison, ("all",), **flags)
    assert processes.wait() == [train.STOPPED] * 2
    (line, same) = [line for line in processes.errors.splitlines() if line.startswith("train.py: ")]
    assert line == same and f"train.py: step {3 + MOST_SKIPPED}, " in line and "as in the 19 steps before" in line
    newest = run.output_dir / "checkpoints" / "step_22"
    assert line.endswith(f"the newest checkpoint is {newest}")
    again = run_ranks(2, **flags, resume=newest, output_dir=f"{run.output_dir}_on")
    assert again.metrics[0]["step"] == 23 and math.isfinite(again.losses[0])


def test_target_out_of_range_in_a_later_shard(start_ranks, tiny, tmp_path):
    """The loader finds it when the shard's turn comes; every rank at the same step, in either order of the data."""
    rng = np.random.default_rng(8)
    for i in range(2):
        tokens = rng.integers(0, 61, 900 + i).astype(np.uint16)
        tokens[700] = (60, 61)[i]
        write_shard(tmp_path / f"shard_{i}.bin", tokens)
    for shuffle in (0, 1):
        flags = FLAGS | {"checkpoint_every": 1, "input_bin": tmp_path / "shard_*.bin"}
        processes, run = start_ranks(2, **flags, shuffle=shuffle)
        assert processes.wait() == [2, 2], processes.errors
        for line in processes.errors.strip().splitlines():
            assert f"{tmp_path / 'shard_1.bin'}: token 700 has the id 61" in line
            if not shuffle:
                assert re.match(r"train.py \[rank \d\]: step 4 \(reading data\): ", line), line
        if not shuffle:
            assert len(run.metrics) == 3 and (run.output_dir / "checkpoints" / "step_3").is_dir()


def diverge(rank: int, what: str) -> None:
    """Let rank 2 of four part from the others after the third step."""

    def part(step: int) -> None:
        if step == 3 and rank == 2:
            if what == "weights":
                with torch.no_grad():
                    states[0].params["transformer.h.1.mlp.c_fc.bias"].view(-1)[5] += 1e-6
            else:
                states[0].loader.next_batch()

    states, run_train = [], train.train
    train.train = lambda config, world, state, *rest: (states.append(state), run_train(config, world, state, *rest))[1]
    after_each_step(part)


@pytest.mark.parametrize(
    ("what", "zero_stage", "told"),
    [("weights", 1, "transformer.h.1.mlp.c_fc.bias"), ("loader", 3, "the loader's position")],
)
def test_rank_that_disagrees_stops_the_run_by_name(start_ranks, what, zero_stage, told):
    processes, run = start_ranks(
        4, diverge, (what,), **FLAGS | {"batch_size": 2}, zero_stage=zero_stage, check_ranks_every=3
    )
    assert processes.wait() == [train.STOPPED] * 4
    assert f"the ranks disagree: rank 2 differs from rank 0 in {told}" in processes.errors
    assert len(run.metrics) == 3


def die_or_hang(rank: int, how: str) -> None:
    """In the second micro-step of the third step, on rank 1. The clocks of the ranks are minutes apart."""
    clock = time.time
    time.time = lambda: clock() + 100 * rank
    if rank != 1:
        return
    next_batch, calls = ShardLoader.next_batch, []

    def read(self):
        calls.append(self)
        if len(calls) == 6:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return next_batch(self)

    ShardLoader.next_batch = read


@pytest.mark.parametrize(
    ("how", "zero_stage", "told"),
    [
        ("dies", 0, r"rank 1 is gone, last heard of at step [0123] \("),
        ("dies", 3, r"rank 1 is gone, last heard of at step [0123] \("),
        ("hangs", 1, r"rank 1 has not arrived, it is at step 3 \(reading data\)"),
    ],
)
def test_others_say_which_rank_died_or_hangs_and_end(start_ranks, how, zero_stage, told):
    started = time.monotonic()
    processes, _ = start_ranks(
        3, die_or_hang, (how,), **FLAGS | {"total_batch_size": 384}, zero_stage=zero_stage, timeout_s=5
    )
    processes.processes[0].join(40)
    processes.processes[2].join(40)
    assert [processes.processes[rank].exitcode for rank in (0, 2)] == [1, 1], processes.errors
    assert time.monotonic() - started < 35
    for rank in (0, 2):
        error = (processes.folder / f"err_{rank}").read_text()
        assert re.search(rf"\[rank {rank}\] waited \d+ s for the other ranks at step 3 \(.*\): .*{told}", error), error


def die_in_step_9(rank: int, checkpoints: Path) -> None:
    """Kill rank 1 of the first attempt, once the checkpoint of step 6 is complete."""

    def die(step: int) -> None:
        if step == 9:
            while not (checkpoints / "step_6").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        after_each_step(die)
    elif rank == 1:
        time.sleep(1)  # rank 0 must not take up with the rank 1 of the attempt before


@pytest.mark.parametrize("begun", [False, True], ids=["a new run", "one that is gone on with"])
def test_torchrun_starts_again_from_the_newest_checkpoint(tmp_path, start_ranks, run_ranks, begun):
    """A rank is killed; `--max-restarts 3` ends with the weights of the run in which none was."""
    flags = {"num_iterations": 12, "checkpoint_every": 3, "shuffle": 1, "zero_stage": 1, "val_loss_every": 5, "keep": 9}
    whole = run_ranks(2, **flags)
    folder = tmp_path / "restarted"
    place = {"output_dir": folder}
    if begun:
        shutil.copytree(whole.output_dir, folder)
        for step in (6, 9, 12):
            shutil.rmtree(folder / "checkpoints" / f"step_{step}")
        place |= {"resume": folder / "checkpoints" / "step_3"}
    processes, restarted = start_ranks(2, die_in_step_9, (folder / "checkpoints",), restarts=3, **flags, **place)
    assert processes.wait() == [0], processes.errors
    assert re.findall(r"resumed from \S+/(step_\d): ", processes.screen) == ["step_3"] * begun + ["step_6"]
    # Whoever sees it first: rank 0, or torchrun, which then stops rank 0.
    assert re.search(r"rank 1 is gone|failed \(exitcode: -9\) local_rank: 1", processes.errors), processes.errors
    assert restarted.log == whole.log and same_weights(restarted, whole)


def test_restart_leaves_a_folder_alone_that_is_of_another_torchrun(start_ranks, run_tiny):
    """torchrun starts the ranks again after they refused it."""
    flags = {"num_iterations": 3, "checkpoint_every": 2}
    other = run_tiny(**flags)
    before = everything_in(other.output_dir)
    processes, _ = start_ranks(1, restarts=2, **flags, output_dir=other.output_dir, learning_rate=1e-3)
    assert processes.wait() == [1] and processes.errors.count("is not empty") == 3, processes.errors
    assert everything_in(other.output_dir) == before


@pytest.mark.parametrize("field", ["torchrun_id", "launch"])
def test_restart_resumes_whichever_name_the_id_has(run_tiny, monkeypatch, field):
    """Older run directories have the field `launch`."""
    flags = {"num_iterations": 3, "checkpoint_every": 2}
    run = run_tiny(**flags)
    shutil.rmtree(run.output_dir / "checkpoints" / "step_3")
    path = run.output_dir / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({field if name == "torchrun_id" else name: value for name, value in content.items()}))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    restarted = run_tiny(**flags, output_dir=run.output_dir)
    assert "checkpoints/step_2: 2 of 3 steps are done" in restarted.screen
    assert json.loads(path.read_text()) == content


def test_one_process_in_an_environment_that_knows_of_ranks(run_tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(run_tiny(num_iterations=2).losses) == 2


def hide_tensorboard(rank: int) -> None:
    sys.modules["torch.utils.tensorboard"] = None


def test_what_one_rank_finds_before_the_first_step_ends_all_of_them(start_ranks):
    processes, _ = start_ranks(2, hide_tensorboard, tensorboard=1)
    assert processes.wait() == [2, 2]
    lines = processes.errors.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"train.py [rank {rank}]" for rank in range(2)]
    assert all(re.search("--tensorboard 1 needs tensorboard.*pip install", line) for line in lines)


def test_restarts_need_a_place(tiny, monkeypatch, capsys):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_MAX_RESTARTS": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    try:
        with pytest.raises(SystemExit) as stopped:
            train.main(command_line(tiny | {"--checkpoint_every": 2}))
    finally:
        torch.distributed.destroy_process_group()
    assert stopped.value.code == 2 and "--max-restarts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kills", "zero_stage"), [(3, 1), *(pytest.param(50, stage, marks=pytest.mark.slow) for stage in (0, 3))]
)
def test_killed_at_random_moments(tmp_path, kills, zero_stage):
    """`python -m tests.training.chaos`."""
    counts = chaos(tmp_path, kills, seed=3, n_ranks=2, zero_stage=zero_stage)
    assert counts["kills"] == kills and counts["runs ended"] >= 1
    assert kills < 50 or (counts["in a save"] > 10 and counts["of one rank"] > 10)
    shutil.rmtree(tmp_path)
