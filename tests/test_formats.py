"""docs/formats.md: what a run and an evaluation leave is read by tests/formats.py, and says the same in every file.

Other tests use these readers too: tests/model/test_llmc.py for every tensor of llm.c's files and its tokenizer,
tests/data/test_prepare.py for shards, and tests/evals/test_eval_file.py for questions.
"""

import hashlib
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data.shards import write_shard
from evals.__main__ import main as evals_main
from kernels.ops import EAGER
from model.gpt import GPT, PRESETS, GPTConfig
from model.llmc import padded_vocab_size, size_name, write_model
from tests import formats
from tests.conftest import command_line
from tests.evals import made

B, T = 2, 16
NETWORK = GPTConfig(block_size=96, n_layer=2, n_head=2, n_embd=8)
"""with GPT-2's vocabulary, so that a tokenizer is written and evaluations can be made"""
N_QUESTIONS = 3


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> Path:
    """A folder with two shards, questions, a run of two updates, and in its directory an evaluation of its weights."""
    folder = tmp_path_factory.mktemp("left")
    gpt, generator = GPT(NETWORK, EAGER), torch.Generator().manual_seed(13)
    with torch.no_grad():
        for param in gpt.parameters():  # so that no two tensors are alike
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.1)
    write_model(folder / "gpt2_made.bin", gpt)
    for i in range(2):
        write_shard(folder / f"train_{i}.bin", np.random.default_rng(i).integers(0, 50257, 50 + i).astype(np.uint16))
    (folder / "text.txt").write_text("The dog runs.")
    flags = {"model": folder / "gpt2_made.bin", "output_dir": folder / "run", "device": "cpu"}
    flags |= {"input_bin": folder / "train_*.bin", "input_val_bin": folder / "train_1.bin", "val_max_steps": 1}
    flags |= {"batch_size": B, "sequence_length": T, "total_batch_size": B * T, "num_iterations": 2, "grad_clip": 0}
    flags |= {"val_loss_every": 2, "sample_every": 0, "eval_every": 2, "evals": f"bpb={folder / 'text.txt'}"}
    flags |= {"write_tensors": 1, "checkpoint_every": 1, "learning_rate": 0.01}
    assert train.main(command_line({f"--{name}": value for name, value in flags.items()})) == 0
    made.hellaswag(folder / "h.jsonl", N_QUESTIONS, longest=3)
    evals_main(["hellaswag", "--data", str(folder / "h.jsonl"), "--write_bin", str(folder / "hellaswag_val.bin")])
    data = {"--data": folder / "hellaswag_val.bin", "--device": "cpu"}
    assert evals_main(["hellaswag", str(folder / "run"), *command_line(data)]) == 0
    return folder


@pytest.fixture(scope="module")
def state(left) -> formats.DebugState:
    network, _ = formats.model(left / "run" / "gpt2_made.bin")
    return formats.debug_state(left / "run" / "gpt2_made_debug_state.bin", network)


def fields(heading: str) -> set[str]:
    """The names in the first column of the first table under a heading of the page."""
    return {name for first, *_ in table(heading) for name in in_backticks(first)}


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a line of the page, without its first row."""
    below = f"\n{formats.PAGE}".split(f"\n{heading}\n")[1]
    rows = re.search(r"\|---.*\n((?:\|.*\n)+)", below)[1].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def in_backticks(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def test_every_file_of_a_run_is_on_the_page(left):
    named = {name.split("/")[-1] for name in fields("# File formats") | fields("## Checkpoints")}
    left_in_run = {path.name for path in (left / "run").rglob("*")} - {"checkpoints"}
    found = set()
    for name in named:
        pattern = re.sub(r"\\{size\\}|\\\*|TASK|ID|(?<=_)[NR](?=_0|$)", r"\\w+", re.escape(name))
        matches = {each for each in left_in_run if re.fullmatch(pattern, each)}
        assert bool(matches) is (name not in ("train_*.bin", "val_*.bin", "hellaswag_val.bin")), name
        found |= matches
    assert found == left_in_run


def test_presets_and_the_sizes_of_their_files():
    rows = [row for row in table("`{size}` follows `--model`:") if row[-1]]
    for models, sizes, *numbers, n_bytes in rows:
        names = in_backticks(models)
        assert [size_name(name) for name in names] == in_backticks(sizes)
        config = GPTConfig(*map(int, numbers))
        assert config == PRESETS[names[0]]
        n_padding = (padded_vocab_size(config.vocab_size) - config.vocab_size) * config.n_embd
        assert int(n_bytes.replace(",", "")) == 1024 + 4 * (config.num_params() + n_padding)
    assert len(rows) == len(PRESETS)


def test_model_files_of_a_run(left):
    (network, start), (_, rounded) = (formats.model(left / "run" / f"gpt2_made{kind}.bin") for kind in ("", "_bf16"))
    assert network == (96, 50257, 2, 2, 8)
    for name, tensor in start.items():
        np.testing.assert_allclose(rounded[name], tensor, rtol=2**-8, err_msg=name)
        assert not (rounded[name].view(np.uint32) & 0xFFFF).any()


def test_debug_state_is_of_the_first_update(left, state):
    tokens = np.array(formats.shard(left / "train_0.bin"))
    assert np.array_equal(state.x, tokens[: B * T].reshape(B, T))
    assert np.array_equal(state.y, tokens[1 : B * T + 1].reshape(B, T))
    logits = state.logits.astype(np.float64)
    of_targets = np.take_along_axis(logits, state.y[..., None].astype(np.int64), -1)[..., 0]
    assert state.loss == pytest.approx((np.log(np.exp(logits).sum(-1)) - of_targets).mean(), rel=1e-5)
    (first, _), _ = formats.metrics(left / "run" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(state.loss, rel=1e-5)
    assert first["norm"] == pytest.approx(math.sqrt(sum((grad**2).sum() for grad in state.grads.values())), rel=1e-4)


def test_logs(left):
    updates, evaluations = formats.metrics(left / "run" / "metrics.jsonl")
    assert [line["step"] for line in updates] == [1, 2] and [line["tokens"] for line in updates] == [B * T, 2 * B * T]
    assert all(line.keys() == fields("### `metrics.jsonl`") for line in updates)
    assert [line["step"] for line in evaluations] == [0, 2]
    assert all(line["evals"]["bpb"].keys() == {"bits_per_byte", "token_perplexity"} for line in evaluations)
    log = formats.main_log(left / "run" / "main.log")
    assert [(i, kind) for i, kind, _ in log] == [(0, "tel"), (0, "trl"), (1, "trl"), (2, "tel")]
    assert [loss for _, kind, loss in log if kind == "trl"] == pytest.approx(
        [line["loss"] for line in updates], abs=1e-6
    )


def test_config(left):
    config = formats.json_object((left / "run" / "config.json").read_text(encoding="utf-8"))
    assert config.keys() == fields("### `config.json`")
    assert config["network"] == formats.model(left / "run" / "model.bin")[0]._asdict()
    assert config["flags"]["learning_rate"] == 0.01 and config["flags"]["backend"] == "eager"
    assert config["versions"]["torch"] == torch.__version__ and config["ranks"] == 1


def test_evaluation(left):
    """Its figures, from the scores and the file of questions."""
    (path,) = (left / "run").glob("hellaswag_*.json")
    results = formats.json_object(path.read_text(encoding="utf-8"))
    assert results.keys() == fields("## Evaluations")
    assert formats.json_lines(left / "run" / "evals.jsonl") == [results]
    fingerprint, scores = formats.scores(path.with_suffix(".items.jsonl"))
    assert fingerprint == results["fingerprint"] and path.stem == f"hellaswag_{fingerprint[:12]}"
    questions = formats.questions(left / "hellaswag_val.bin")
    assert len(questions) == len(scores) == results["items"] == N_QUESTIONS
    right, right_norm = 0, 0
    for (label, _, endings), of_question in zip(questions, scores, strict=True):
        likelihoods = np.array([ll for ll, _ in of_question])
        right += likelihoods.argmax() == label
        right_norm += (likelihoods / [len(ending) for ending in endings]).argmax() == label
    assert results["figures"] == pytest.approx({"acc": right / N_QUESTIONS, "acc_norm": right_norm / N_QUESTIONS})


def test_checkpoint_tensors(left, state):
    """The first update's moments follow from the debug state's gradients; the last weights are those in model.bin."""
    _, tensors = formats.checkpoint(left / "run" / "checkpoints" / "step_1")
    assert len(tensors) == 4 * len(state.grads)
    for name, grad in state.grads.items():
        first, second, steps = (tensors[f"optimizer.{name}.{kind}"] for kind in ("exp_avg", "exp_avg_sq", "step"))
        np.testing.assert_allclose(first, 0.1 * grad, rtol=1e-3, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(second, 0.05 * grad**2, rtol=1e-3, atol=1e-9, err_msg=name)
        assert steps.shape == () and steps == 1
    _, tensors = formats.checkpoint(left / "run" / "checkpoints" / "step_2")
    for name, weight in formats.model(left / "run" / "model.bin")[1].items():
        np.testing.assert_array_equal(tensors[f"model.{name}"], weight, err_msg=name, strict=True)


def test_checkpoint_state(left):
    saved, _ = formats.checkpoint(left / "run" / "checkpoints" / "step_1")
    assert saved.keys() == fields("### `state.json`")
    shards = [np.array(formats.shard(left / f"train_{i}.bin"), "<u2") for i in range(2)]
    ends = b"".join(tokens[:1024].tobytes() + tokens[-1024:].tobytes() for tokens in shards)
    # The first shard's other 18 tokens are fewer than an update reads.
    assert saved["loader"] == {
        "shard": 1,
        "base": 0,
        "lengths": [50, 51],
        "digest": hashlib.sha256(ends).hexdigest(),
    }
    updates, _ = formats.metrics(left / "run" / "metrics.jsonl")
    windows = {name: [updates[0][name]] for name in ("loss", "norm")}
    assert saved["guard"] == {"windows": windows, "skipped": 0, "in_a_row": 0}
    assert saved["tokens"] == B * T and saved["scaler"] == {} and saved["rng"]["cuda"] is None
    torch.Generator().set_state(torch.tensor(list(bytes.fromhex(saved["rng"]["torch"])), dtype=torch.uint8))
    version, numbers, gauss = saved["rng"]["python"]
    random.Random().setstate((version, tuple(numbers), gauss))
    np.random.RandomState().set_state(saved["rng"]["numpy"])
