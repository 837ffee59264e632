"""--eval_every and --evals of train.py: the figures of the same weights, on every number of ranks at every stage."""

import json
from pathlib import Path

import pytest
import torch

import train
from common import BadInput
from evals.hellaswag import open_hellaswag
from evals.perplexity import open_bpb
from evals.score import score_items
from model.llmc import load_model
from tests.conftest import Run, command_line
from tests.evals import made
from tests.evals.conftest import SMALL
from tests.training import ranks
from training.config import parse
from training.distributed import World
from training.log import RunLog

WORLD = World(0, 0, 1, torch.device("cpu"), False)


@pytest.fixture(scope="module")
def flags(small, tiny, tmp_path_factory) -> dict:
    """Of a run that evaluates three questions and a line of text before and after its only update."""
    folder = tmp_path_factory.mktemp("flags")
    made.hellaswag(folder / "h.jsonl", 3, longest=5)
    (folder / "t.txt").write_text("The dog runs under the roof.")
    evals = f"hellaswag={folder / 'h.jsonl'},bpb={folder / 't.txt'}"
    changed = {"--model": small, "--num_iterations": 1, "--sample_every": 0, "--total_batch_size": 128}
    return tiny | changed | {"--eval_every": 1, "--evals": evals, "--learning_rate": 0.1}


def evaluations_in(run: Run) -> list[dict]:
    return [line for line in run.metrics if "evals" in line]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Run:
    """The run on one process."""
    output_dir = tmp_path_factory.mktemp("alone") / "run"
    assert train.main(command_line(flags | {"--output_dir": output_dir})) == 0
    return Run(output_dir, "")


def test_figures_of_the_weights_at_each_step(flags, alone, small):
    question_file, text_file = (part.partition("=")[2] for part in flags["--evals"].split(","))
    for line, path in zip(evaluations_in(alone), (small, alone.output_dir), strict=True):
        gpt = load_model(path)
        for task in (open_hellaswag(Path(question_file)), open_bpb(text_file, SMALL.block_size)):
            want = task.figures(score_items(gpt, task, WORLD, torch.autocast("cpu", enabled=False), 64))
            assert line["evals"][task.name] == pytest.approx(want, rel=1e-6)
    before, after = evaluations_in(alone)
    assert before["step"] == 0 and after["step"] == 1 and before["evals"] != after["evals"]
    assert [line["step"] for line in alone.metrics if "loss" in line] == [1]


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 2)), 3])  # the hardest
def test_ranks_give_the_figures_of_one(flags, alone, tmp_path, stage):
    """Two ranks, three questions, one text: in some passes one of the ranks has nothing of its own."""
    given = flags | {"--output_dir": tmp_path / "run", "--zero_stage": stage, "--timeout_s": 30}
    processes = ranks.start(2, command_line(given), tmp_path / "screen")
    assert processes.wait() == [0, 0], processes.errors
    ours, theirs = evaluations_in(Run(tmp_path / "run", "")), evaluations_in(alone)
    assert ours[0] == theirs[0] if stage < 2 else ours[0]["evals"].keys() == theirs[0]["evals"].keys()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["step"] == other["step"]
        for task in ("hellaswag", "bpb"):
            assert mine["evals"][task] == pytest.approx(other["evals"][task], rel=1e-5)
    assert processes.screen.count("hellaswag: acc ") == 2


def test_a_resumed_run_drops_what_it_will_repeat(tmp_path):
    log = RunLog(tmp_path).open()
    for step in (0, 1, 2):
        log.evaluation(step, {"hellaswag": {"acc": 0.25 + step, "acc_norm": float("nan")}})
        if step < 2:
            log.train({"step": step + 1, "loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "evals": {"hellaswag": {"acc": 0.25, "acc_norm": None}}}
    RunLog(tmp_path).open(steps_done=2)
    left = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert left == lines[:-1]
    RunLog(tmp_path).open(steps_done=1)
    left = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert left == lines[:2]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--eval_every 5", "--eval_every does nothing without --evals"),
        ("--evals hellaswag", "--evals does nothing without --eval_every"),
    ],
)
def test_one_flag_without_the_other(given, told):
    with pytest.raises(BadInput, match=told):
        parse(given.split())


@pytest.mark.parametrize(
    ("evals", "told"),
    [
        ("hellaswag=nowhere,bpb", "--evals hellaswag=nowhere,bpb: cannot read nowhere"),
        ("mmlu", "--evals mmlu: no evaluation is called 'mmlu'; choose from hellaswag, lambada, wikitext, bpb"),
    ],
)
def test_evaluations_that_cannot_be_made(flags, tmp_path, capsys, evals, told):
    with pytest.raises(SystemExit) as stopped:
        train.main(command_line(flags | {"--output_dir": tmp_path / "run", "--evals": evals}))
    assert stopped.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_vocabulary_that_is_not_gpt2s(flags, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(command_line(flags | {"--output_dir": tmp_path / "run", "--model": tiny["--model"]}))
    assert stopped.value.code == 2
    assert (
        "--evals hellaswag=" in (line := capsys.readouterr().err) and "the model has a vocabulary of 61 tokens" in line
    )
