"""Flags: defaults, help, and what is refused before anything is touched. And the version, which three files state."""

import dataclasses
import re
import tomllib

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
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| group | llm.c's flags |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\w+) \|(.*)\|(.*)\|$", table, re.MULTILINE)
    named = [(group, *(re.findall(r"`--(\w+)`", names) for names in columns)) for group, *columns in rows]
    assert {name: group for group, *columns in named for names in columns for name in names} == FLAGS
    assert {name for _, of_llmc, _ in named for name in of_llmc} == LLMC_FLAGS


def test_version_is_the_same_in_every_file():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for file, line in (("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## \[(\S+)\]")):
        found = re.findall(line, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert found[:1] == [version], file  # the newest stands first


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
    assert "rises linearly. (default: 0; on the embedded corpus 10)" in text
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
    ("device", "model", "B", "T", "lr", "dtype"),
    [
        ("cpu", "nano", 8, 128, 2e-3, "float32"),
        ("mps", "nano", 8, 128, 2e-3, "float32"),
        ("cuda", "d12", 64, 1024, 6e-4, "bfloat16"),
    ],
)
def test_defaults_follow_the_device(device, model, B, T, lr, dtype):
    config = parse([]).resolved(device).with_batch(2, lambda: 64)
    assert (config.model, config.batch_size, config.sequence_length) == (model, B, T)
    assert (config.total_batch_size, config.learning_rate, config.dtype) == (2 * B * T, lr, dtype)
    assert (config.overfit_single_batch, config.write_tensors, config.zero_stage) == (0, 0, 0)
    assert (config.num_iterations, config.grad_clip, config.val_max_steps) == (200, 1.0, 20)


def test_schedule_and_order_follow_the_corpus():
    embedded, given = (parse(flags).resolved("cpu") for flags in ([], ["--input_bin", "a"]))
    names = ("shuffle", "warmup_iters", "learning_rate_decay_frac")
    assert [getattr(embedded, name) for name in names] == [1, 10, 0.1]
    assert [getattr(given, name) for name in names] == [0, 0, 1.0]  # llm.c's
    assert parse(["--shuffle", "0"]).resolved("cpu").shuffle == 0


def test_a_batch_that_follows_the_memory_divides_the_total():
    def batch(*flags: str, largest: int = 64) -> tuple[int, int]:
        config = parse(list(flags)).resolved("cuda").with_batch(2, lambda: largest)
        return config.batch_size, config.grad_accum_steps(2)

    assert batch("--total_batch_size", str(2**19)) == (64, 4)
    assert batch("--total_batch_size", str(24 * 2048)) == (8, 3)
    assert batch("--total_batch_size", "2048") == (1, 1)
    assert batch("--batch_size", "3") == (3, 1)
    with pytest.raises(BadInput, match="no multiple"):
        batch("--total_batch_size", "2000")


@pytest.mark.parametrize(
    ("flags", "world_size", "nearest"),
    [("--batch_size 4 --sequence_length 64 --total_batch_size 1000", 1, "768 or 1024"),
     ("--batch_size 4 --sequence_length 64 --total_batch_size 1000", 8, "2048"),
     ("--batch_size 4 --sequence_length 64 --total_batch_size 100", 1, "256")],
)  # fmt: skip
def test_total_batch_that_is_no_multiple_names_the_nearest(flags, world_size, nearest):
    with pytest.raises(BadInput, match=f"^--total_batch_size .*nearest that is: {nearest}$"):
        parse(flags.split()).resolved("cpu").with_batch(world_size, lambda: 1)


def test_validation_defaults_to_on_only_where_there_are_shards():
    assert parse([]).resolved("cpu").val_loss_every == 50
    assert parse(["--input_bin", "a"]).resolved("cpu").val_loss_every == 0
    assert parse(["--input_bin", "a", "--input_val_bin", "b"]).resolved("cpu").val_loss_every == 50
    assert parse(["--input_val_bin", ""]).resolved("cpu").val_loss_every == 0
    for without in (["--input_bin", "a"], ["--input_val_bin", ""]):
        with pytest.raises(BadInput, match="--val_loss_every needs validation shards"):
            parse([*without, "--val_loss_every", "5"]).resolved("cpu")


def test_what_does_not_go_together_on_a_device_is_refused():
    assert parse(["--residual_dtype", "bfloat16"]).resolved("cuda").dtype == "bfloat16"
    with pytest.raises(BadInput, match="--dtype is float32"):
        parse(["--residual_dtype", "bfloat16"]).resolved("cpu")


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
            "--residual_dtype bfloat16 --dtype float32",
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
