"""The records of a run: llm.c's lines, JSON that parses, a picture that is one."""

import json
import sys

import pytest
import torch
from matplotlib.image import imread

from common import BadInput
from training.log import RunLog, peak_memory_mib


def test_main_log_has_llmc_lines_and_metrics_are_json(tmp_path):
    log = RunLog(tmp_path)
    log.validation(0, 10.8234567)
    log.train({"step": 0, "loss": 10.5, "norm": float("inf"), "mfu": None})
    log.train({"step": 1, "loss": float("nan"), "norm": 1.25, "mfu": None})
    assert (tmp_path / "main.log").read_text() == "s:0 tel:10.823457\ns:0 trl:10.500000\ns:1 trl:nan\n"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "loss": 10.5, "norm": None, "mfu": None},
        {"step": 1, "loss": None, "norm": 1.25, "mfu": None},
    ]


def test_picture_shows_both_curves_and_is_redrawn(tmp_path):
    log = RunLog(tmp_path, title="a run")
    log.validation(0, 10.0)
    first = imread(tmp_path / "loss.png")
    for step in range(20):
        log.train({"step": step, "loss": 9.0 - step / 8})
    log.validation(20, 5.0)
    second = imread(tmp_path / "loss.png")
    assert first.shape == second.shape == (540, 960, 4)

    def pixels(image, color):  # of a curve's own colour
        return (abs(image[..., :3] - torch.tensor(color).numpy()).max(-1) < 0.02).sum()

    blue, orange = (0.122, 0.467, 0.706), (1.0, 0.498, 0.055)
    assert pixels(first, blue) == 0 and pixels(first, orange) > 20
    assert pixels(second, blue) > 500 and pixels(second, orange) > 300
    assert [path.name for path in tmp_path.glob("*.png")] == ["loss.png"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.train({"step": 0, "loss": 1.0})
    log.validation(0, 1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match=r"--tensorboard 1 .*pip install"):
        RunLog(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, tensorboard=True)
    log.train({"step": 0, "loss": 1.0, "norm": 2.0, "mfu": None})
    log.validation(0, 3.0)
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/norm", "validation/loss"}


def test_peak_memory_counts_what_was_held():
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(64 * 2**18 + int(before * 2**18))  # 64 MiB more than ever before
    assert peak_memory_mib(torch.device("cpu")) >= before + 60
    del held
