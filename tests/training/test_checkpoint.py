"""Checkpoints: what is resumed is the run that was never cut; a damaged one is refused by name."""

import ctypes
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from common import BadInput, exclusive
from data.loader import ShardLoader
from data.shards import open_shard
from model.gpt import GPT
from model.llmc import write_model
from tests.conftest import TINY, Run, command_line
from tests.training.conftest import (
    after_each_step,
    assert_weights_agree,
    before_each_save,
    everything_in,
    make_sums_fit,
    same_weights,
    weights_of,
)
from training import checkpoint
from training.log import RunLog

STRIDE = 8
FLAGS = {
    "num_iterations": 20,
    "batch_size": STRIDE,
    "total_batch_size": 2 * STRIDE * 16,
    "val_loss_every": 6,
    "val_max_steps": 2,
    "shuffle": 1,
    "weight_decay": 0.1,
    "warmup_iters": 5,
    "learning_rate_decay_frac": 0.1,
}


@pytest.fixture(scope="module")
def _whole(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    given = FLAGS | {"checkpoint_every": 10, "output_dir": folder}
    assert train.main(command_line(tiny | {f"--{name}": value for name, value in given.items()})) == 0
    return folder


@pytest.fixture
def whole(_whole, tmp_path) -> Run:
    """A run with checkpoints of its steps 10 and 20: a copy that a test may spoil."""
    return Run(shutil.copytree(_whole, tmp_path / "whole"), "")


def steps_there(run) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.find(run.output_dir / checkpoint.FOLDER)]


def without_times(run) -> list[dict]:
    changing = ("ms", "tok_per_s", "mfu", "memory_mib")
    return [{key: value for key, value in line.items() if key not in changing} for line in run.metrics]


def assert_no_cut_shows(run, flags, steps) -> None:
    """Make a run, and make it again from its checkpoints of some steps."""
    whole = run(**flags, checkpoint_every=1, keep=20)
    assert steps_there(whole) == list(range(20, 0, -1))
    for step in steps:
        cut = run(
            **flags,
            resume=whole.output_dir / "checkpoints" / f"step_{step}",
            output_dir=whole.output_dir.with_name(f"{step}_later"),
        )
        assert without_times(cut) == without_times(whole)[step:]
        assert cut.log == [line for line in whole.log if int(re.match(r"s:(\d+)", line)[1]) >= step]
        assert same_weights(cut, whole)


@pytest.mark.parametrize("steps", [(1, 5, 6, 7, 14, 19), pytest.param(range(1, 20), marks=pytest.mark.slow)])
def test_cut_in_one_process(run_tiny, steps):
    """At both ends, around a validation (6), and in between; or after any step."""
    assert_no_cut_shows(run_tiny, FLAGS, steps)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", range(4))
def test_cut_after_any_step_on_two_ranks(run_ranks, zero_stage):
    flags = FLAGS | {"zero_stage": zero_stage, "batch_size": STRIDE // 2}
    assert_no_cut_shows(functools.partial(run_ranks, 2), flags, range(1, 20))


def die_after(rank: int, step: int) -> None:
    """kill -9 to all ranks between two steps, when the checkpoint of the last is under way."""

    def die(done: int) -> None:
        if done == step:
            time.sleep(0.3 * rank)
            os.kill(os.getpid(), signal.SIGKILL)

    after_each_step(die)


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "cuts"),
    [pytest.param(4, 0, (5, 10), marks=pytest.mark.slow), (2, 1, (5, 10)), (2, 3, (10,))],
)
def test_cut_and_resumed_on_ranks(start_ranks, run_ranks, ranks, zero_stage, cuts):
    """Killed after steps of which the checkpoint may or may not be intact, and resumed by `auto`, once or twice.

    From three ranks on, the sums that DDP takes depend on where a gradient is in its bucket.
    """
    flags = FLAGS | {"zero_stage": zero_stage, "checkpoint_every": 2, "num_iterations": 12}
    flags["batch_size"] = STRIDE // ranks
    whole = run_ranks(ranks, **flags)
    for at in cuts:
        processes, cut = start_ranks(
            ranks, die_after, (at,), **flags, resume="auto", output_dir=f"{whole.output_dir}_cut"
        )
        assert -signal.SIGKILL in processes.wait()
    cut.output_dir = Path(cut.output_dir)
    newest = steps_there(cut)[0]  # 8, or 6 where the kill came before the last save was whole
    cut = run_ranks(ranks, **flags, resume="auto", output_dir=cut.output_dir)
    assert newest in (6, 8) and f"step_{newest}: {newest} of 12 steps are done" in cut.screen
    assert cut.losses == whole.losses
    assert without_times(cut) == without_times(whole) and cut.log == whole.log
    assert same_weights(cut, whole)


def test_saved_on_two_ranks_at_stage_1_and_resumed_elsewhere(run_ranks):
    flags = FLAGS | {"num_iterations": 12}
    whole = run_ranks(2, **flags | {"batch_size": STRIDE // 2, "zero_stage": 1, "checkpoint_every": 8})
    for ranks, zero_stage in ((0, 0), (4, 1), (4, 3)):
        flags |= {"batch_size": STRIDE // max(1, ranks), "zero_stage": zero_stage}
        run = run_ranks(ranks, **flags, resume=whole.output_dir / "checkpoints" / "step_8")
        assert run.losses == pytest.approx(whole.losses[8:], rel=1e-6)
        assert_weights_agree(run, whole, 1e-6)


def test_state_holds_every_generator_scale_and_window(run_tiny):
    """A run that draws random numbers at each step, in float16, with outliers: nothing of it may start over."""
    flags = FLAGS | {"dtype": "float16", "skip_loss_z": 3, "skip_norm_z": 3, "num_iterations": 6}
    run = run_tiny(**flags, checkpoint_every=3)
    state = json.loads((run.output_dir / "checkpoints" / "step_3" / "state.json").read_text())
    assert state["step"] == 3 and state["loader"]["sequence"] == 3 * 2 * STRIDE
    assert [len(window) for window in state["guard"]["windows"].values()] == [3, 3]
    assert state["guard"]["windows"]["loss"] == run.losses[:3]
    assert state["scaler"]["scale"] == 65536
    assert state["versions"]["torch"] == torch.__version__ and state["network"]["n_embd"] == 32

    generators = (lambda: torch.rand(1).item(), random.random, np.random.rand)
    train_state = checkpoint.TrainState.__new__(checkpoint.TrainState)
    for name in ("loader", "guard", "scaler"):
        setattr(train_state, name, type("", (), {"state_dict": lambda self: {}, "is_enabled": lambda self: False})())
    train_state.guard.load_state_dict = lambda state: None
    train_state.device, train_state.step = torch.device("cpu"), 1
    saved = json.loads(json.dumps(train_state.state_dict()))
    drawn = [draw() for draw in generators]
    assert drawn != [draw() for draw in generators]
    train_state.load_state_dict(saved)
    assert drawn == [draw() for draw in generators]


def test_newest_are_kept_and_multiples(run_tiny):
    flags = FLAGS | {"val_loss_every": 0}
    assert steps_there(run_tiny(**flags, checkpoint_every=2)) == [20, 18]
    assert steps_there(run_tiny(**flags, checkpoint_every=2, keep=1, keep_every=8)) == [20, 16, 8]
    assert steps_there(run_tiny(**flags, checkpoint_every=7, keep=9)) == [20, 14, 7]


def spoil(folder: Path, how: str) -> str:
    """Damage a checkpoint; what is said of it."""
    file = folder / ("state.json" if how == "state" else "__0_0.distcp")
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[:-1])
    elif how in ("flipped", "state"):
        file.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
    elif how == "missing":
        file.unlink()
    else:
        file = folder / "SHA256SUMS"
        file.write_bytes(file.read_bytes()[:70] if how == "sums cut" else b"\xff")
    return str(folder.name if how == "sums cut" else f"{folder.name}/{file.name}")


@pytest.mark.parametrize("how", ["truncated", "flipped", "state", "missing", "sums cut", "sums broken"])
def test_damaged_checkpoint_is_refused_by_name_and_auto_takes_the_one_before(run_tiny, whole, capsys, how):
    newest, before = (whole.output_dir / "checkpoints" / f"step_{step}" for step in (20, 10))
    name = spoil(newest, how)
    for path in (newest, f"{newest}/"):
        with pytest.raises(SystemExit) as stopped:
            run_tiny(**FLAGS, resume=path)
        errors = capsys.readouterr().err
        assert stopped.value.code == 2 and name in errors and errors.count("\n") == 1
    losses = whole.losses
    again = run_tiny(**FLAGS, resume="auto", output_dir=whole.output_dir)
    assert "refused step_20: " in again.screen and name in again.screen
    assert f"resumed from {before}" in again.screen
    assert again.losses == losses
    assert newest.with_name("step_20.aside").is_dir()

    spoil(before, "flipped")
    with pytest.raises(SystemExit) as stopped:
        run_tiny(**FLAGS, resume="auto", output_dir=whole.output_dir)
    assert stopped.value.code == 2 and "none of the 1 checkpoints" in capsys.readouterr().err


def test_checkpoint_is_resumed_from_whatever_else_lies_in_it(run_tiny, whole):
    """A file manager's notes, and a state from before tokens were counted."""
    folder = whole.output_dir / "checkpoints" / "step_10"
    (folder / ".DS_Store").write_text("mine")
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("tokens") == 10 * 256
    (folder / "state.json").write_text(json.dumps(state))
    make_sums_fit(folder)
    assert without_times(run_tiny(**FLAGS, resume=folder)) == without_times(whole)[10:]


def test_links_and_strays_among_checkpoints_stop_nothing_and_are_not_followed(run_tiny, tmp_path):
    """A checkpoint was moved to an archive, and a link put in its place; and whatever may bear a reserved name."""
    run = run_tiny(**FLAGS, checkpoint_every=5, keep=9)
    folder, archive = run.output_dir / "checkpoints", tmp_path / "archive"
    archive.mkdir()
    for step in (5, 20):
        (folder / f"step_{step}").rename(archive / f"step_{step}")
        (folder / f"step_{step}").symlink_to(archive / f"step_{step}")
    (folder / "step_20.aside").symlink_to(archive)
    (folder / ".step_20.part").symlink_to(archive)
    (folder / ".step_21.part").write_text("half")
    (folder / ".step_notes").mkdir()
    (folder / "step_30").write_text("a file")
    (folder / "step_40").symlink_to(tmp_path / "nowhere")
    (folder / "step_050").mkdir()
    before = everything_in(archive)

    assert "20 of 20 steps are done" in run_tiny(**FLAGS, resume="auto", output_dir=run.output_dir).screen
    assert not any(os.path.lexists(folder / name) for name in (".step_20.part", ".step_21.part", "step_30", "step_40"))
    again = run_tiny(**FLAGS, resume=folder / "step_15", output_dir=run.output_dir, checkpoint_every=2, keep=1)
    assert os.readlink(folder / "step_20.aside") == str(archive / "step_20")
    assert again.losses == run.losses and "warning" not in again.screen
    assert steps_there(again) == [20, 5] and (folder / "step_5").is_symlink()
    assert (folder / ".step_notes").is_dir() and (folder / "step_050").is_dir()
    assert everything_in(archive) == before
    assert "20 of 20 steps are done" in run_tiny(**FLAGS, resume="auto", output_dir=run.output_dir).screen


def test_checkpoint_under_another_steps_name_is_refused(run_tiny, whole, capsys):
    folder = whole.output_dir / "checkpoints" / "step_10"
    folder.rename(folder.with_name("step_12"))
    with pytest.raises(SystemExit):
        run_tiny(**FLAGS, resume=folder.with_name("step_12"))
    assert "it is of step 10" in capsys.readouterr().err


def test_part_that_is_a_link_is_not_written_through(run_tiny, tmp_path, monkeypatch):
    save = checkpoint.Checkpoints.save
    (tmp_path / "outside").mkdir()

    def plant(self, state):
        self.folder.mkdir(exist_ok=True)
        (self.folder / f".step_{state.step}.part").symlink_to(tmp_path / "outside")
        save(self, state)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", plant)
    run = run_tiny(**FLAGS | {"num_iterations": 4}, checkpoint_every=4)
    assert "the checkpoint of step 4 was not written" in run.screen and "is a link" in run.screen
    assert list((tmp_path / "outside").iterdir()) == []


def test_run_of_another_configuration_is_refused_field_by_field(run_tiny, whole, capsys):
    other = FLAGS | {"learning_rate": 1e-3, "num_iterations": 30, "total_batch_size": 4 * STRIDE * 16}
    with pytest.raises(SystemExit) as stopped:
        run_tiny(**other, resume=whole.output_dir, output_dir="nowhere")
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and not Path("nowhere").exists()
    for difference in (
        "flags learning_rate was 0.003 and is 0.001",
        "flags num_iterations was 20 and is 30",
        "flags total_batch_size was 256 and is 512",
    ):
        assert difference in line
    assert "warmup_iters" not in line
    run = run_tiny(**other, resume=whole.output_dir, resume_override=1, checkpoint_every=5)
    assert [line["step"] for line in run.metrics] == list(range(21, 31))
    tokens = [line["tokens"] for line in whole.metrics + run.metrics]
    assert tokens == [256 * (n + 1) for n in range(20)] + [20 * 256 + 512 * (n + 1) for n in range(10)]
    again = run_tiny(**other, resume=run.output_dir / "checkpoints" / "step_25")
    assert [line["tokens"] for line in again.metrics] == tokens[25:]


@pytest.mark.parametrize("shape", [{"n_layer": 1}, {"n_layer": 3}, {"n_embd": 16}, {"block_size": 16}])
def test_network_of_another_shape_is_refused_and_nothing_is_touched(run_tiny, whole, tmp_path, capsys, shape):
    before = everything_in(whole.output_dir)
    write_model(tmp_path / "gpt2_other.bin", GPT(dataclasses.replace(TINY, **shape)))
    flags = FLAGS | {"model": tmp_path / "gpt2_other.bin", "resume_override": 1, "output_dir": whole.output_dir}
    with pytest.raises(SystemExit) as stopped:
        run_tiny(**flags, resume=whole.output_dir / "checkpoints" / "step_10")
    ((name, value),) = shape.items()
    assert stopped.value.code == 2
    assert f"network {name} was {getattr(TINY, name)} and is {value}" in capsys.readouterr().err
    assert everything_in(whole.output_dir) == before


def test_folder_is_held_before_a_checkpoint_in_it_is_chosen(run_tiny, whole, monkeypatch):
    """Or a run that ends in between deletes the one that was chosen."""
    choose = checkpoint.choose

    def ask_for_it_too(*args):
        with pytest.raises(BadInput, match="another run writes to it"), exclusive(whole.output_dir, "--output_dir"):
            pass
        asked.append(args)
        return choose(*args)

    asked: list = []
    monkeypatch.setattr(checkpoint, "choose", ask_for_it_too)
    for resume in ("auto", whole.output_dir, whole.output_dir / "checkpoints" / "step_10"):
        run_tiny(**FLAGS, resume=resume, output_dir=whole.output_dir)
    assert len(asked) == 3


def test_run_resumes_through_a_link_to_its_folder(run_tiny, whole, tmp_path):
    (tmp_path / "link").symlink_to(whole.output_dir)
    run = run_tiny(**FLAGS, resume=whole.output_dir / "checkpoints" / "step_10", output_dir=tmp_path / "link")
    assert "10 of 20 steps are done" in run.screen and len(run.metrics) == 20


def test_run_whose_name_looks_like_a_checkpoint(run_tiny, whole, tmp_path, capsys):
    whole.output_dir = whole.output_dir.rename(tmp_path / "step_size_3e-3")
    shutil.rmtree(whole.output_dir / "checkpoints" / "step_20")
    assert "10 of 20 steps are done" in run_tiny(**FLAGS, resume=whole.output_dir).screen
    (whole.output_dir / "checkpoints" / "step_10").rename(whole.output_dir / "checkpoints" / "step_10.aside")
    with pytest.raises(SystemExit):
        run_tiny(**FLAGS, resume=whole.output_dir / "checkpoints" / "step_10.aside")
    assert "no checkpoint there" in capsys.readouterr().err


def test_disk_with_room_for_one_more_checkpoint_is_enough(run_tiny, capsys, monkeypatch):
    P = TINY.num_params()
    room = SimpleNamespace(free=4 * P + 3 * 12 * P)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    whole = run_tiny(**FLAGS, checkpoint_every=10, resume="auto")
    room.free = 4 * P + 12 * P
    run_tiny(**FLAGS, checkpoint_every=10, resume="auto", output_dir=whole.output_dir)
    room.free -= 1
    with pytest.raises(SystemExit):
        run_tiny(**FLAGS, checkpoint_every=10, resume="auto", output_dir=whole.output_dir)
    assert "the disk has" in capsys.readouterr().err


def test_old_checkpoint_that_cannot_be_deleted_is_said_and_no_more(run_tiny, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoint, "_delete", refuse)
    run = run_tiny(**FLAGS, checkpoint_every=10, keep=1)
    assert steps_there(run) == [20, 10]
    (warning,) = [line for line in run.screen.splitlines() if "warning" in line]
    assert warning == f"warning: {run.output_dir / 'checkpoints' / 'step_10'} cannot be deleted: Permission denied"


def test_other_shards_are_refused_or_read_from_the_beginning(run_tiny, whole, tiny, capsys):
    with pytest.raises(SystemExit):
        run_tiny(**FLAGS, resume=whole.output_dir, input_bin=tiny["--input_val_bin"])
    assert "the saved position is of 2 shards" in capsys.readouterr().err
    run = run_tiny(**FLAGS, resume=whole.output_dir, input_bin=tiny["--input_val_bin"], resume_override=1)
    assert "reading the data from the beginning" in run.screen


def test_log_is_on_disk_before_the_checkpoint_that_follows_it(run_tiny, monkeypatch):
    events = []
    sync, save = RunLog.sync, checkpoint.Checkpoints.save
    monkeypatch.setattr(RunLog, "sync", lambda self: (events.append("sync"), sync(self))[1])
    monkeypatch.setattr(
        checkpoint.Checkpoints, "save", lambda self, state: (events.append(state.step), save(self, state))[1]
    )
    run_tiny(**FLAGS, checkpoint_every=10)
    assert events == ["sync", 10, "sync", 20]


def test_auto_starts_a_run_and_restarts_one_without_a_checkpoint(run_tiny, tmp_path, capsys):
    first = run_tiny(**FLAGS, resume="auto", checkpoint_every=50)
    shutil.rmtree(first.output_dir / "checkpoints")
    again = run_tiny(**FLAGS, resume="auto", output_dir=first.output_dir)
    assert [line["step"] for line in again.metrics] == list(range(1, 21))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine").write_text("mine")
    with pytest.raises(SystemExit):
        run_tiny(**FLAGS, resume="auto", output_dir=tmp_path / "notes")
    assert "is not empty" in capsys.readouterr().err


def test_training_continues_while_one_save_is_under_way(run_tiny, monkeypatch):
    """Writing takes as long as four steps: it is waited for at the next save and at the end, and not between."""
    write, rename = checkpoint._Writer.write_data, os.rename
    events, threads = [], set()

    def slow_write(self, plan, planner):
        threads.add(threading.current_thread() is threading.main_thread())
        events.append(("begun", checkpoint.step_of(self.folder)))
        time.sleep(0.4)
        return write(self, plan, planner)

    def noted_rename(source, target):
        rename(source, target)
        if Path(target).name.startswith("step_"):
            events.append(("whole", checkpoint.step_of(Path(target))))

    train_line = RunLog.train

    def slow_line(self, metrics):
        train_line(self, metrics)
        events.append(("step", metrics["step"]))
        time.sleep(0.1)

    monkeypatch.setattr(checkpoint._Writer, "write_data", slow_write)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(RunLog, "train", slow_line)
    run = run_tiny(**(FLAGS | {"num_iterations": 8, "val_loss_every": 0}), checkpoint_every=6)
    assert threads == {False} and steps_there(run) == [8, 6]
    order = [event for event in events if event[0] != "begun" or event[1]]
    assert order.index(("begun", 6)) < order.index(("step", 7)) < order.index(("whole", 6))
    assert order.index(("whole", 6)) < order.index(("begun", 8)) < order.index(("whole", 8))
    weights = weights_of(run)
    saved = {name: torch.full_like(w, torch.nan).detach() for name, w in weights.items()}
    folder = run.output_dir / "checkpoints" / "step_8"
    torch.distributed.checkpoint.load({"model": saved}, checkpoint_id=folder, no_dist=True)  # by nothing but torch
    assert all(torch.equal(saved[name], w) for name, w in weights.items())


def obstruct(rank: int, how: str) -> None:
    """Let the operating system refuse the saves of steps 4 and 6: the disk of the last rank is full, or nobody may
    write to the folder."""
    save = checkpoint.Checkpoints.save
    if how == "permission":
        let_permissions_count()

    def save_where_it_cannot_be(self, state):
        obstructed = state.step in (4, 6)
        if how == "permission" and state.step > 2:
            os.chmod(self.folder, 0o555 if obstructed else 0o755)
        elif obstructed and rank == 1:
            part = self.folder / f".step_{state.step}.part"
            part.mkdir(exist_ok=True)
            (part / "__1_0.distcp").symlink_to("/dev/full")
        save(self, state)
        self.wait()

    checkpoint.Checkpoints.save = save_where_it_cannot_be


def let_permissions_count() -> None:
    """Give up what lets root write anywhere: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, see capabilities(7)."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1 | 1 << 2)
    assert libc.capset(header, sets) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full and capabilities are Linux's")
@pytest.mark.parametrize(
    ("how", "told", "zero_stage"), [("full", "No space left on device", 3), ("permission", "Permission denied", 0)]
)
def test_failed_save_is_reported_and_the_run_continues(run_ranks, how, told, zero_stage):
    flags = FLAGS | {"num_iterations": 8, "batch_size": STRIDE // 2, "zero_stage": zero_stage}
    undisturbed = run_ranks(2, **flags)
    run = run_ranks(2, obstruct, (how,), **flags, checkpoint_every=2, keep=9)
    assert run.losses == undisturbed.losses and same_weights(run, undisturbed)
    newest = run.output_dir / "checkpoints" / "step_2"
    warnings = [line for line in run.screen.splitlines() if "warning" in line]
    for step, warning in zip((4, 6), warnings, strict=True):
        assert f"the checkpoint of step {step} was not written" in warning and told in warning, warning
        assert warning.endswith(f"the newest checkpoint is {newest}")
    assert steps_there(run) == [8, 2]
    assert not list((run.output_dir / "checkpoints").glob(".*"))
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.find(run.output_dir / "checkpoints"))


def preempt(rank: int, moment: str, number: int) -> None:
    """Send a signal to the last rank at a moment of the seventh step."""
    if rank == 0:
        return
    next_batch, validate = ShardLoader.next_batch, train.validate
    batches = []

    def on_batch(self):
        batches.append(self)
        if moment == "step" and len(batches) == 14:  # in the second micro-step of the seventh step
            os.kill(os.getpid(), number)
        return next_batch(self)

    def on_validation(*args):
        seen = len(batches)
        if moment == "validation" and seen == 12:
            os.kill(os.getpid(), number)
        loss = validate(*args)
        del batches[seen:]
        return loss

    def on_save(step: int) -> None:
        if moment == "save" and step == 6:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    ShardLoader.next_batch, train.validate = on_batch, on_validation
    before_each_save(on_save)


@pytest.mark.parametrize(
    ("moment", "number", "zero_stage"),
    [("step", signal.SIGTERM, 0), ("validation", signal.SIGUSR1, 3), ("save", signal.SIGTERM, 1)],
)
def test_preempted_run_saves_and_resumes_bitwise_identical(run_ranks, moment, number, zero_stage):
    flags = FLAGS | {"num_iterations": 12, "batch_size": STRIDE // 2, "zero_stage": zero_stage}
    every = {"checkpoint_every": 6 if moment == "save" else 0}
    whole = run_ranks(2, **flags)
    first = run_ranks(2, preempt, (moment, int(number)), **flags, **every)  # exit status 0
    assert "stopped by SIGTERM, SIGUSR1 or SIGHUP after step" in first.screen
    (line,) = [line for line in first.screen.splitlines() if line.startswith("resume: ")]
    assert line.startswith("resume: torchrun ... train.py ") and line.endswith(
        "--resume auto --output_dir " + str(first.output_dir)
    )
    done = len(first.metrics)
    assert done in ((7,) if moment != "save" else (7, 8)) and steps_there(first)[0] == done
    again = run_ranks(2, **flags, **every, resume="auto", output_dir=first.output_dir)
    assert again.log == whole.log and again.losses == whole.losses
    assert same_weights(again, whole)


def hold_at_step_5(rank: int, folder: Path) -> None:
    """Say that step 5 is reached, and wait until told to go on."""

    def hold(step: int) -> None:
        if step == 5 and rank == 0:
            (folder / "there").touch()
            while not (folder / "go").exists():
                time.sleep(0.02)

    after_each_step(hold)


@pytest.mark.skipif(sys.platform != "linux", reason="folders have locks on Linux")
def test_second_run_in_one_folder_is_refused_and_the_first_continues(start_ranks, run_ranks, tmp_path):
    """As when a job is queued again while the machine still runs it."""
    flags = FLAGS | {"num_iterations": 8, "batch_size": STRIDE // 2, "checkpoint_every": 2, "resume": "auto"}
    whole = run_ranks(2, **flags)
    processes, first = start_ranks(2, hold_at_step_5, (tmp_path,), **flags)
    while not (tmp_path / "there").exists():
        time.sleep(0.02)
    second, _ = start_ranks(2, **flags | {"output_dir": first.output_dir})
    assert second.wait() == [2, 2]
    told = f"--output_dir {first.output_dir}: another run writes to it; wait for its end, or name another"
    assert [line.partition("]: ")[2] for line in second.errors.splitlines()] == [told] * 2
    (tmp_path / "go").touch()
    assert processes.wait() == [0, 0]
    assert first.log == whole.log and same_weights(first, whole)
    third = run_ranks(2, **flags, output_dir=first.output_dir)
    assert "8 of 8 steps are done" in third.screen


def preempt_on_a_full_disk(rank: int) -> None:
    preempt(rank, "step", int(signal.SIGTERM))

    def refuse(step: int) -> None:
        raise OSError(28, "No space left on device")

    before_each_save(refuse)


def test_preempted_run_that_could_not_save_does_not_end_well(start_ranks):
    processes, run = start_ranks(2, preempt_on_a_full_disk, **FLAGS | {"batch_size": STRIDE // 2})
    assert processes.wait() == [train.STOPPED] * 2
    assert "the checkpoint of step 7 was not written" in processes.screen and "resume: " not in processes.screen
    assert (run.output_dir / "model.bin").exists()


def test_signal_in_the_last_step_changes_nothing(run_ranks):
    flags = FLAGS | {"num_iterations": 7, "batch_size": STRIDE // 2, "val_loss_every": 3}
    run = run_ranks(2, preempt, ("step", int(signal.SIGTERM)), **flags)
    assert run.log == run_ranks(2, **flags).log and run.log[-1].startswith("s:7 tel:")
    assert "stopped" not in run.screen and "resume: " not in run.screen


def stall_in_step_4(rank: int) -> None:
    """Let the last rank write for longer than the others wait."""
    before_each_save(lambda step: time.sleep(5 if rank == 1 and step == 4 else 0))
    after_each_step(lambda step: time.sleep(7 if step == 5 else 0))  # the save ends, on both ranks, before the next


def test_save_after_one_that_timed_out_is_written(run_ranks):
    flags = FLAGS | {"num_iterations": 12, "batch_size": STRIDE // 2, "val_loss_every": 0, "timeout_s": 3}
    run = run_ranks(2, stall_in_step_4, **flags, checkpoint_every=4, keep=9)
    (warning,) = [line for line in run.screen.splitlines() if "warning" in line]
    assert "the checkpoint of step 4 was not written" in warning and "Timed out" in warning
    assert steps_there(run) == [12, 8]


def test_ctrl_c_saves_where_checkpoints_are_on(start_ranks):
    for every, expected in ((100, [5]), (0, [])):
        processes, run = start_ranks(0, interrupt_at_step_4, checkpoint_every=every, **FLAGS)
        assert processes.wait() == [train.INTERRUPTED]
        assert steps_there(run) == expected and processes.errors == ""
        assert ("resume: python train.py" in processes.screen) == bool(expected)
        steps = int(re.search(r"stopped by Ctrl-C after step (\d+) of 20", processes.screen)[1])
        assert steps == len(run.metrics) == 5 and run.log[-1].startswith("s:4 trl:")
        assert (run.output_dir / "loss.png").exists() and weights_of(run)


def test_second_ctrl_c_does_not_wait_for_a_save(start_ranks):
    started = time.monotonic()
    processes, run = start_ranks(0, interrupt_twice, checkpoint_every=2, **FLAGS)
    assert processes.wait() == [-signal.SIGINT]
    assert time.monotonic() - started < 30 and processes.errors == ""
    assert steps_there(run) == [] and len(run.metrics) in (2, 3)


def interrupt_twice(rank: int) -> None:
    """Once the save of step 2 is under way, which would take a minute."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    before_each_save(interrupt)


def interrupt_at_step_4(rank: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    after_each_step(lambda step: step == 4 and os.kill(os.getpid(), signal.SIGINT))


def keep_tokens(rank: int, folder: Path, stop_after: int) -> None:
    """Write what this rank reads to `folder`, a row a sequence, and preempt the run after so many steps."""
    next_batch, reads = ShardLoader.next_batch, []

    def read(self):
        x, y = next_batch(self)
        reads.append(torch.cat([x, y[:, -1:]], dim=1))
        return x, y

    def keep(step: int) -> None:
        torch.save(torch.stack(reads), folder / f"tokens_{rank}.pt")
        if step == stop_after and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    ShardLoader.next_batch = read
    after_each_step(keep)


@pytest.mark.parametrize("shuffle", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_four_ranks_then_two_then_four_read_every_sequence_once_in_order(run_ranks, tiny, tmp_path, shuffle):
    """The signal comes after a step's reduction, so one more step is made: 4 + 3 + 3 steps of 8 sequences."""
    T, total = 16, 8 * 16
    read = []
    flags = {"num_iterations": 10, "batch_size": 2, "total_batch_size": total, "shuffle": shuffle}
    for ranks, stop_after in ((4, 3), (2, 6), (4, 99)):
        folder = tmp_path / f"{len(read)}"
        folder.mkdir()
        run_ranks(ranks, keep_tokens, (folder, stop_after), **flags, output_dir=tmp_path / "elastic", resume="auto")
        tokens = [torch.load(folder / f"tokens_{rank}.pt") for rank in range(ranks)]
        read += [row for batches in zip(*tokens, strict=True) for batch in batches for row in batch.tolist()]
    assert len(read) == 10 * 8
    shards = [
        np.asarray(open_shard(path)).astype(int).tolist()
        for path in sorted(Path(tiny["--input_bin"]).parent.glob("train_*"))
    ]
    order = [shard[i * T : (i + 1) * T + 1] for shard in shards for i in range((len(shard) - 1) // T)]
    if shuffle:
        one = ShardLoader(tiny["--input_bin"], 1, T, vocab_size=61, shuffle_seed=train.SEED)
        order = [x[0].tolist() + y[0, -1:].tolist() for x, y in (one.next_batch() for _ in range(len(read)))]
        assert len({tuple(row) for row in order}) == len(order)
    assert read == order[: len(read)]
