"""Flags: defaults, help, and what is refused before anything is touched."""

import dataclasses
import re

import pytest

from common import BadInput
from tests.conftest import ROOT
from training.config import Config, flag, parse

FLAGS = {field.name: field.metadata["group"] for field in dataclasses.fields(Config)}
LLMC_FLAGS = {  # of its train_gpt2.py
    *("input_bin", "input_val_bin", "output_dir", "model", "batch_size", "sequence_length", "total_batch_size"),
    *("num_iterations", "inference_only", "learning_rate", "warmup_iters", "learning_rate_decay_frac", "weight_decay"),
    *("grad_clip", "val_loss_every", "val_max_steps", "sample_every", "overfit_single_batch", "tensorcores", "device"),
    *("compile", "flash", "dtype", "zero_stage", "write_tensors"),
}


def test_every_flag_is_there_and_in_readmes_table():
    assert FLAGS.keys() >= LLMC_FLAGS
    rows = re.findall(r"^\| (\w+) \| (`--.*`) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    in_readme = {name: group for group, names in rows for name in re.findall(r"`--(\w+)`", names)}
    assert in_readme == FLAGS


def test_help_lists_every_flag_in_groups_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in FLAGS:
        assert f"--{name} " in text
    for group in ("model", "data", "batch", "optimisation", "evaluation", "machine", "output"):
        assert f"\n{group}:\n" in text
    for field in dataclasses.fields(Config):
        assert field.metadata["help"].endswith("."), field.name
    text = " ".join(text.split())
    assert "Tokens in a sequence, T. (default: 128; on a GPU 1024)" in text
    assert "Number of updates. (default: 200)" in text
    assert "is refused where attention is a Triton kernel" in text


def test_no_flag_is_left_unclassed():
    """A resumed run is compared with the one before by the flags that decide."""
    with pytest.raises(TypeError, match="decides"):
        flag(0, "machine", help="A new one.")  # type: ignore[call-arg]
    assert all(type(field.metadata["decides"]) is bool for field in dataclasses.fields(Config))
    assert set(Config().deciding()) == {
        *("shuffle", "overfit_single_batch", "sequence_length", "total_batch_size", "num_iterations", "learning_rate"),
        *("warmup_iters", "learning_rate_decay_frac", "weight_decay", "grad_clip", "skip_loss_z", "skip_norm_z"),
        *("dtype", "residual_dtype"),
    }


@pytest.mark.parametrize(
    ("device", "model", "B", "T", "total", "steps", "lr"),
    [
        ("cpu", "nano", 8, 128, 1024, 200, 2e-3),
        ("mps", "nano", 8, 128, 1024, 200, 2e-3),
        ("cuda", "d12", 4, 1024, 16384, 200, 6e-4),
    ],
)
def test_defaults_follow_the_device(device, model, B, T, total, steps, lr):
    config = parse([]).resolved(device, world_size=1)
    assert (config.model, config.batch_size, config.sequence_length) == (model, B, T)
    assert (config.total_batch_size, config.num_iterations, config.learning_rate) == (total, steps, lr)
    assert (config.overfit_single_batch, config.write_tensors, config.zero_stage) == (0, 0, 0)
    assert (config.dtype, config.grad_clip, config.val_max_steps) == ("float32", 1.0, 20)


def test_default_total_batch_grows_to_a_multiple():
    assert parse([]).resolved("cuda", world_size=8).total_batch_size == 4 * 1024 * 8
    assert parse(["--batch_size", "3"]).resolved("cpu", world_size=1).total_batch_size == 3 * 128 * 3
    assert parse([]).resolved("cuda", world_size=2).grad_accum_steps(2) == 2


@pytest.mark.parametrize(
    ("flags", "world_size", "nearest"),
    [("--batch_size 4 --sequence_length 64 --total_batch_size 1000", 1, "768 or 1024"),
     ("--batch_size 4 --sequence_length 64 --total_batch_size 1000", 8, "2048"),
     ("--batch_size 4 --sequence_length 64 --total_batch_size 100", 1, "256")],
)  # fmt: skip
def test_total_batch_that_is_no_multiple_names_the_nearest(flags, world_size, nearest):
    with pytest.raises(BadInput, match=f"^--total_batch_size .*nearest that is: {nearest}$"):
        parse(flags.split()).resolved("cpu", world_size)


def test_validation_defaults_to_on_only_where_there_are_shards():
    assert parse([]).resolved("cpu", 1).val_loss_every == 50
    assert parse(["--input_bin", "a"]).resolved("cpu", 1).val_loss_every == 0
    assert parse(["--input_bin", "a", "--input_val_bin", "b"]).resolved("cpu", 1).val_loss_every == 50
    assert parse(["--input_val_bin", ""]).resolved("cpu", 1).val_loss_every == 0
    for without in (["--input_bin", "a"], ["--input_val_bin", ""]):
        with pytest.raises(BadInput, match="--val_loss_every needs validation shards"):
            parse([*without, "--val_loss_every", "5"]).resolved("cpu", 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--batch_size 0", "--batch_size is 0"),
        ("--sequence_length -3", "--sequence_length is -3"),
        ("--num_iterations -1", "--num_iterations is -1"),
        ("--learning_rate nan", "--learning_rate is nan"),
        ("--grad_clip inf", "--grad_clip is inf"),
        ("--weight_decay -0.1", "--weight_decay is -0.1"),
        ("--dtype int8", "--dtype: invalid choice"),
        ("--compile 2", "--compile: invalid choice"),
        ("--zero_stage 4", "--zero_stage: invalid choice"),
        ("--batch_size four", "--batch_size: invalid int value"),
        ("--no_such_flag 1", "unrecognized arguments: --no_such_flag 1"),
        ("--batch 4", "unrecognized arguments: --batch 4"),
        ("--write_tensors 1 --output_dir=", "--write_tensors 1 has nowhere to write to"),
        ("--tensorboard 1 --output_dir=", "--tensorboard 1 has nowhere to write to"),
        ("--batch_size=--", "argument --batch_size: -- is no value"),
        ("--batch_size ٣", "--batch_size: invalid int value"),
        ("--learning_rate ٣.٥", "--learning_rate: invalid float value"),
        (f"--num_iterations {'9' * 400}", "--num_iterations is 9{400}; it must be from 0 to"),
        (f"--num_iterations {'9' * 5000}", "--num_iterations: invalid int value"),
        ("--weight_decay 1e400", "--weight_decay is inf; it must be from 0.0 to 1000000000000.0$"),
        ("--skip_loss_z 1e39", "--skip_loss_z is 1e"),
        ("--skip_loss_z -1", "--skip_loss_z is -1"),
        ("--keep 0", "--keep is 0"),
        ("--timeout_s 0", "--timeout_s is 0"),
        ("--timeout_s 10000000000", "--timeout_s is 10000000000; it must be from 1 to 1000000000$"),
        ("--checkpoint_every 2 --output_dir=", "--checkpoint_every has nowhere to write to"),
        ("--checkpoint_every 2 --inference_only 1", "--checkpoint_every has nothing to save"),
        (
            "--residual_dtype bfloat16",
            "--residual_dtype bfloat16 needs matmuls of the same type.*give --dtype bfloat16",
        ),
        ("--cuda_graph 1 --dtype float16", "--cuda_graph 1 does not go with --dtype float16.*give --dtype bfloat16"),
        ("--cuda_graph 1 --inference_only 1", "--cuda_graph captures updates.*leave one of them out"),
        ("--resume=", '--resume is ""'),
        ("--resume auto", "--resume auto needs an --output_dir"),
        ("--resume auto --output_dir a --inference_only 1", "--resume continues a training run"),
        ("--resume a --inference_only 1", "--resume continues a training run"),
        ("--model=", "--model is"),
        ("--input_bin=", "--input_bin is"),
    ],
)
def test_impossible_values_are_refused_by_name(flags, named):
    with pytest.raises(BadInput, match=named):
        parse(flags.split())
