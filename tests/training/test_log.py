"""The records of a run: llm.c's lines, JSON that parses, a picture that is one."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from matplotlib.image import imread

from common import BadInput, print0
from training.log import RunLog, peak_memory_mib, resource


def test_main_log_has_llmc_lines_and_metrics_are_json(tmp_path):
    log = RunLog(tmp_path).open()
    log.validation(0, 10.8234567)
    log.train({"step": 1, "loss": 10.5, "norm": float("inf"), "mfu": None})
    log.train({"step": 2, "loss": float("nan"), "norm": 1.25, "mfu": None})
    assert (tmp_path / "main.log").read_text() == "s:0 tel:10.823457\ns:0 trl:10.500000\ns:1 trl:nan\n"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 10.5, "norm": None, "mfu": None},
        {"step": 2, "loss": None, "norm": 1.25, "mfu": None},
    ]


@pytest.fixture(autouse=True)
def _blank_pictures():
    """Here they are drawn."""


def test_picture_shows_both_curves_and_is_redrawn_but_not_all_the_time(tmp_path, monkeypatch):
    log = RunLog(tmp_path, title="a run").open()
    log.validation(0, 10.0)
    assert not (tmp_path / "loss.png").exists()  # the log is not ten seconds old
    log.draw()
    first = imread(tmp_path / "loss.png")
    for step in range(20):
        log.train({"step": step + 1, "loss": 9.0 - step / 8})
    log.validation(19, 6.0)
    assert (imread(tmp_path / "loss.png") == first).all()  # nor is the picture
    monkeypatch.setattr("training.log.DRAW_EVERY_S", 0)
    log.validation(20, 5.0)
    second = imread(tmp_path / "loss.png")
    assert first.shape == second.shape == (540, 960, 4)

    def pixels(image, color):  # of a curve's own colour
        return (abs(image[..., :3] - torch.tensor(color).numpy()).max(-1) < 0.02).sum()

    blue, orange = (0.122, 0.467, 0.706), (1.0, 0.498, 0.055)
    assert pixels(first, blue) == 0 and pixels(first, orange) > 20
    assert pixels(second, blue) > 500 and pixels(second, orange) > 300
    assert [path.name for path in tmp_path.glob("*.png")] == ["loss.png"]


@pytest.mark.parametrize("title", ["$x_{$", "$\\frac$ _^ \n", "日本 \udcff", "x" * 3000])
def test_title_is_drawn_as_it_stands(tmp_path, title, capfd):
    log = RunLog(tmp_path, title).open()
    log.validation(0, 10.0)
    log.draw()
    assert imread(tmp_path / "loss.png").shape == (540, 960, 4)
    assert capfd.readouterr() == ("", "")


def test_whatever_fails_in_a_picture_or_in_events_is_one_warning(tmp_path, monkeypatch, capfd):
    class Broken:
        def __init__(self, *arguments, **more):
            raise OverflowError("too\nmany points")

    monkeypatch.setattr("matplotlib.figure.Figure", Broken)
    monkeypatch.setattr("training.log._tensorboard_writer", lambda: Broken)
    log = RunLog(tmp_path).open(tensorboard=True)
    log._events = cast(Any, SimpleNamespace(add_scalar=Broken, close=Broken))  # as of one that fails later
    for step in (1, 2, 3):
        log.train({"step": step, "loss": 1.0})
        log.validation(step, 1.0)
    log.close()
    names = ("events.out.tfevents*", "loss.png")
    told = [f"warning: cannot write {tmp_path / name}: OverflowError: too many points" for name in names]
    assert capfd.readouterr() == ("".join(f"{line}; the run continues\n" for line in told), "")
    assert len((tmp_path / "main.log").read_text().splitlines()) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"main.log", "metrics.jsonl"}


def test_control_characters_are_printed_as_escapes(capsys):
    print0("a\x1b[2Jb\udcff\rc é\td\n")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\udcff\\rc é\td\n\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_full_disk_is_told_of_and_lines_wait(tmp_path, capsys):
    log = RunLog(tmp_path).open()
    log.train({"step": 1, "loss": 1.0})
    main, kept = tmp_path / "main.log", tmp_path / "kept"
    for times, written in ((1, 1), (2, 4)):  # full, and full again later
        main.rename(kept)
        main.symlink_to("/dev/full")
        for step in (2 * times, 2 * times + 1):
            log.train({"step": step, "loss": 1.0})
        kept.rename(main)
        assert len(main.read_text().splitlines()) == written
        log.validation(2 * times, 1.0) if times == 1 else log.close()
    order = ["0 trl", "1 trl", "2 trl", "2 tel", "3 trl", "4 trl"]
    assert main.read_text().splitlines() == [f"s:{line}:1.000000" for line in order]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    told = f"warning: cannot write {main}: No space left on device; free some space or choose another place"
    assert capsys.readouterr().out.splitlines() == [f"{told}; the run continues"] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_screen_on_a_full_disk(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print0("a line")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed


@pytest.mark.skipif(sys.platform == "win32", reason="inodes")
def test_sync_is_of_both_logs(tmp_path, monkeypatch):
    log = RunLog(tmp_path).open()
    log.train({"step": 1, "loss": 1.0})
    synced = {}
    monkeypatch.setattr(os, "fsync", lambda file: synced.update({os.fstat(file).st_ino: os.fstat(file).st_size}))
    log.sync()
    there = [(tmp_path / name).stat() for name in ("main.log", "metrics.jsonl")]
    assert synced == {stat.st_ino: stat.st_size for stat in there} and all(synced.values())


def test_folder_that_is_gone_is_no_reason_to_stop(tmp_path, capsys):
    log = RunLog(tmp_path / "run").open()
    log.train({"step": 1, "loss": 1.0})
    log.validation(1, 1.0)
    log.draw()
    (tmp_path / "run").mkdir()
    log.close()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"main.log", "metrics.jsonl", "loss.png"}
    assert (tmp_path / "run" / "main.log").read_text() == "s:0 trl:1.000000\ns:1 tel:1.000000\n"
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        f"cannot write {tmp_path / 'run' / name}" for name in ("main.log", "metrics.jsonl", "loss.png")
    ]


@pytest.mark.skipif(resource is None, reason="Windows has no limits")
def test_line_that_was_written_in_part_is_finished_later(tmp_path, capsys):
    """The operating system takes a part of the last write that fits, as it does on a disk that gets full."""
    log = RunLog(tmp_path).open()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25, limits[1]))
        for step in (1, 2, 3):
            log.train({"step": step, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "main.log").read_text() == "s:0 trl:1.000000\ns:1 trl:"
    log.close()
    assert (tmp_path / "main.log").read_text() == "".join(f"s:{step} trl:1.000000\n" for step in range(3))


NUL = b"\0" * 40
NO_STEPS = (b"null", b'"1"', b"-1", b"true", b"1.0", b"NaN", b"1e999", b"9" * 5000)
SPOILT = {  # by file: lines that stay, and lines that do not
    "main.log": (
        [b"s:0 trl:1.000000", b"s:0 tel:nan", b"s:1 trl:-inf"],
        [NUL, b"\xff\xfe", b"s:x trl:1.000000", b"s:\xd9\xa3 trl:1.000000", NUL + b"s:1"]
        + [b"s:1 trl:" + value for value in (b"", b"x", b"1e5")],
    ),
    "metrics.jsonl": (
        [b'{"step": 1, "loss": 1.0}', b'{"step": 2, "loss": null}'],
        [b'{"step": 1', b'{"step": 1, "los{"step": 1, "loss": 1.0}', NUL, b"[]", b"1", b"{}", b"[" * 100_000]
        + [b'{"step": %s}' % step for step in NO_STEPS],
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_lines_are_left_out_and_counted(tmp_path, capsys, name):
    good, spoilt = SPOILT[name]
    lines = [line for pair in zip(good, spoilt, strict=False) for line in pair] + spoilt[len(good) :]
    (tmp_path / name).write_bytes(b"\n".join([*lines, b"s:1 trl:1.00000"]))  # and half a line at the end
    RunLog(tmp_path).open(steps_done=9)
    told = f"warning: {tmp_path / name}: lines that cannot be read are left out: {len(spoilt) + 1}\n"
    assert capsys.readouterr().out == told
    assert (tmp_path / name).read_bytes().splitlines() == good
    RunLog(tmp_path).open(steps_done=1).draw()
    assert capsys.readouterr().out == ""


def train_steps(log: RunLog, steps: range, **more: float | None) -> None:
    """A validation before the first of these updates and after each."""
    for step in steps:
        log.validation(step - 1, 1.0 + step) if step == steps.start else None
        log.train({"step": step, "loss": 1.0 + step} | more)
        log.validation(step, 2.0 + step)


def test_resumed_run_has_every_step_once(tmp_path):
    """Updates up to the checkpoint stay; the validation after it, which comes before the next update, is repeated."""
    whole = RunLog(tmp_path / "whole")
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    train_steps(whole.open(), range(1, 8), tokens=5)
    train_steps(RunLog(tmp_path / "cut").open(), range(1, 6), tokens=5)
    cut = RunLog(tmp_path / "cut").open(steps_done=3)
    train_steps(cut, range(4, 8), tokens=5)
    for name in ("main.log", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (cut.train_losses, [step for step, _ in cut.val_losses]) == (whole.train_losses, list(range(8)))


@pytest.mark.parametrize("first", [0, 4])
def test_metrics_that_count_from_0_are_not_mixed_with_others(tmp_path, first):
    """As they were written once, from the first step or from a resumed one."""
    (tmp_path / "main.log").write_text("".join(f"s:{step} trl:1.000000\n" for step in range(first, first + 3)))
    old = "".join(f'{{"step": {step}}}\n' for step in range(first, first + 3))
    (tmp_path / "metrics.jsonl").write_text(old)
    with pytest.raises(BadInput, match=r"metrics.jsonl counts steps from 0.*; move it away"):
        RunLog(tmp_path).open(steps_done=first + 2)
    assert (tmp_path / "metrics.jsonl").read_text() == old
    RunLog(tmp_path).open()
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "main.log").read_text() == ""


def test_events_have_every_step_once_after_a_resume_and_a_start_from_scratch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps_done in (0, 3, 0):
        time.sleep(1.1 if any(tmp_path.iterdir()) else 0)  # events are ordered by files that are named by the second
        log = RunLog(tmp_path).open(steps_done, tensorboard=True)
        train_steps(log, range(steps_done + 1, steps_done + 5), norm=0.5, mfu=None)
        log.close()
        events = EventAccumulator(str(tmp_path)).Reload()
        assert set(events.Tags()["scalars"]) == {"train/loss", "train/norm", "validation/loss"}
        for name in ("train/loss", "train/norm"):
            assert [event.step for event in events.Scalars(name)] == list(range(1, steps_done + 5))
        assert [event.step for event in events.Scalars("validation/loss")] == list(range(steps_done + 5))


def test_peak_memory_counts_what_was_held():
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(64 * 2**18 + int(before * 2**18))  # 64 MiB more than ever before
    assert peak_memory_mib(torch.device("cpu")) >= before + 60
    del held
