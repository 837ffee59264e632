"""The flags of train.py, as one dataclass: what was given is checked here, and what was not is filled in."""

import argparse
import dataclasses
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common import BadInput

DTYPES = ("float32", "float16", "bfloat16")

LONGEST_TIMEOUT_S = 10**9
"""torch counts nanoseconds in 64 bits"""
LARGEST = 1e12
"""of a number that is no count: the product of three still fits float32"""

LAPTOP = {
    "model": "nano",
    "batch_size": 8,
    "sequence_length": 128,
    "total_batch_size": 1024,
    "num_iterations": 200,
    "learning_rate": 2e-3,
}
GPU = {
    "model": "d12",
    "batch_size": 4,
    "sequence_length": 1024,
    "total_batch_size": 16384,
    "num_iterations": 200,
    "learning_rate": 6e-4,
}
DECIDING = (
    *("shuffle", "overfit_single_batch", "sequence_length", "total_batch_size", "num_iterations", "learning_rate"),
    *("warmup_iters", "learning_rate_decay_frac", "weight_decay", "grad_clip", "skip_loss_z", "skip_norm_z", "dtype"),
)
BY_DEVICE = {"cpu": LAPTOP, "mps": LAPTOP, "cuda": GPU}
"""Defaults that follow the device: the largest preset that suits it, and a run of minutes."""


def flag(default: Any, group: str, help: str, choices: tuple | None = None) -> Any:
    """A field of Config that is a flag of the same name; `help` is its documentation in both places."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices})


def switch(default: int, group: str, help: str) -> Any:
    """A flag that takes 0 or 1."""
    return flag(default, group, help, choices=(0, 1))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. A field that is None follows the device: see `resolved`.

    Raises:
        BadInput: a value is impossible whatever the device and the model.
    """

    model: str | None = flag(
        None,
        "model",
        "What to train: nano, d12, d24, d36 or d48 (random weights); gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub "
        "name or a folder of transformers (pretrained); a .bin file of llm.c or a run directory (default: nano on a "
        "CPU, d12 on a GPU).",
    )
    backend: str | None = flag(
        None,
        "model",
        "What computes the ops: triton, eager, or sdpa (eager but for attention by scaled_dot_product_attention), and "
        "exceptions by op, as in triton,attention=sdpa (default: triton on a GPU, eager elsewhere).",
    )
    flash: int = switch(0, "model", "llm.c's name for --backend sdpa: 1 makes eager attention sdpa.")

    input_bin: str | None = flag(
        None, "data", "Glob of the training shards (default: the embedded corpus, tokenised on first use)."
    )
    input_val_bin: str | None = flag(
        None, "data", 'Glob of the validation shards; "" for none (default: none, or the embedded corpus\'s own).'
    )
    shuffle: int = switch(
        0,
        "data",
        "1 reads shards and sequences in an order drawn anew for each epoch, the same for any number of ranks; 0 in "
        "the order on disk, as llm.c.",
    )
    overfit_single_batch: int = switch(0, "data", "1 trains on the first batch over and over, to see the loss fall.")

    batch_size: int | None = flag(None, "batch", "Sequences in a micro-batch of one rank, B (default: 8; GPU 4).")
    sequence_length: int | None = flag(None, "batch", "Tokens in a sequence, T (default: 128; GPU 1024).")
    total_batch_size: int | None = flag(
        None,
        "batch",
        "Tokens per update over all ranks, a multiple of B*T*ranks (default: the smallest multiple that is at least "
        "1024; GPU 16384).",
    )

    num_iterations: int | None = flag(None, "optimisation", "Number of updates (default: 200).")
    learning_rate: float | None = flag(None, "optimisation", "Peak learning rate (default: 2e-3; GPU 6e-4).")
    warmup_iters: int = flag(0, "optimisation", "Updates over which the learning rate rises linearly.")
    learning_rate_decay_frac: float = flag(
        1.0, "optimisation", "Fraction of the learning rate at which the cosine ends; 1 keeps it constant."
    )
    weight_decay: float = flag(0.0, "optimisation", "AdamW's decay of the tensors of two or more dimensions.")
    grad_clip: float = flag(1.0, "optimisation", "Largest norm of the gradient; 0 does not clip.")
    skip_loss_z: float = flag(
        0.0,
        "optimisation",
        "Skip an update whose loss lies more than so many standard deviations above the mean of the last 128; 0 skips "
        "none but those that are not finite.",
    )
    skip_norm_z: float = flag(
        0.0, "optimisation", "The same for the norm of the gradient before it is clipped; 0 skips none."
    )

    val_loss_every: int | None = flag(
        None, "evaluation", "Steps between validations; 0 for none (default: 50 where there are validation shards)."
    )
    val_max_steps: int = flag(20, "evaluation", "Batches of a validation, on each rank.")
    sample_every: int | None = flag(
        None, "evaluation", "Steps between samples; 0 for none (default: 100 for GPT-2's vocabulary)."
    )
    inference_only: int = switch(0, "evaluation", "1 measures forward passes only; nothing is trained.")
    check: int = switch(
        0,
        "evaluation",
        "1 holds the backend against eager on one batch, op by op and parameter by parameter, and exits 1 if one is "
        "off; nothing is trained or written.",
    )

    device: str = flag("", "machine", "cuda, mps or cpu (default: the first of them that is there).")
    dtype: str = flag("float32", "machine", "Type of the matmuls; below float32, autocast around the forward.", DTYPES)
    tensorcores: int = switch(0, "machine", "1 lets float32 matmuls round their inputs to TF32.")
    compile: int = switch(0, "machine", "1 compiles the model with torch.compile.")
    recompute: int = flag(
        0,
        "machine",
        "What the backward pass makes again instead of keeping it: 0 nothing, 1 GELUs, 2 LayerNorms too.",
        (0, 1, 2),
    )
    zero_stage: int = flag(
        0,
        "machine",
        "What is sharded over the ranks of torchrun: 0 nothing, 1 the optimizer state, 2 gradients too, 3 parameters "
        "too.",
        (0, 1, 2, 3),
    )
    timeout_s: int = flag(600, "machine", "Seconds that a rank waits for the others before it gives up and says why.")
    check_ranks_every: int = flag(
        0,
        "machine",
        "Steps between comparisons of the ranks' weights, which stop the run where they differ; 0 for none.",
    )

    checkpoint_every: int = flag(
        0, "checkpoints", "Steps between checkpoints; 0 saves only where SIGTERM, SIGUSR1 or SIGHUP end the run."
    )
    keep: int = flag(2, "checkpoints", "How many of the newest checkpoints stay.")
    keep_every: int = flag(
        0, "checkpoints", "Checkpoints of steps that are a multiple of this stay as well; 0 for none."
    )
    resume: str = flag(
        "0",
        "checkpoints",
        "auto goes on from the newest whole checkpoint in --output_dir, or begins there if it has none; a path, from "
        "that checkpoint, or the newest of that run directory, in its run directory unless --output_dir names a new "
        "folder; 0 begins anew.",
    )
    resume_override: int = switch(
        0, "checkpoints", "1 resumes although data order, batch or schedule differ from the checkpoint's."
    )

    output_dir: str | None = flag(
        None, "output", 'Folder for everything that the run leaves; "" leaves nothing (default: a new one under runs/).'
    )
    write_tensors: int = switch(
        0, "output", "1 writes the first weights, a debug state and the tokenizer in llm.c's formats."
    )
    tensorboard: int = switch(0, "output", "1 writes TensorBoard events too (needs the extra: tensorboard).")

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "total_batch_size", "val_max_steps", "timeout_s", "keep"):
            self._check(name, getattr(self, name), least=1)
        if self.timeout_s > LONGEST_TIMEOUT_S:
            raise BadInput(f"--timeout_s is {self.timeout_s}; it must be at most {LONGEST_TIMEOUT_S}")
        for name in ("num_iterations", "warmup_iters", "val_loss_every", "sample_every", "check_ranks_every"):
            self._check(name, getattr(self, name), least=0)
        for name in ("checkpoint_every", "keep_every"):
            self._check(name, getattr(self, name), least=0)
        for name in ("learning_rate", "learning_rate_decay_frac", "weight_decay", "grad_clip"):
            self._check(name, getattr(self, name), least=0.0)
        for name in ("skip_loss_z", "skip_norm_z"):
            self._check(name, getattr(self, name), least=0.0)
        if self.model == "":
            raise BadInput('--model is ""; give a preset, a name or a path, or leave it out')
        if self.input_bin == "":
            raise BadInput('--input_bin is ""; give a glob of shards, or leave it out for the embedded corpus')
        if self.val_loss_every and self.input_val_bin == "":
            raise BadInput("--val_loss_every needs validation shards: give --input_val_bin, or --val_loss_every 0")
        if self.output_dir == "" and (self.write_tensors or self.tensorboard):
            name = "write_tensors" if self.write_tensors else "tensorboard"
            raise BadInput(f'--{name} 1 has nowhere to write to: give an --output_dir that is not ""')
        if self.checkpoint_every and self.output_dir == "":
            raise BadInput('--checkpoint_every has nowhere to write to: give an --output_dir that is not ""')
        if self.checkpoint_every and self.inference_only:
            raise BadInput("--checkpoint_every has nothing to save with --inference_only 1; leave one of them out")
        if self.resume == "auto" and not self.output_dir:
            raise BadInput("--resume auto needs an --output_dir: the run to go on with")
        if self.resume == "":
            raise BadInput('--resume is ""; give auto, the path of a checkpoint or a run directory, or 0')
        if self.resume != "0" and self.inference_only:
            raise BadInput("--resume goes on with a training run; leave it or --inference_only 1 out")

    @staticmethod
    def _check(name: str, value: float | None, least: float) -> None:
        most = LARGEST if isinstance(least, float) else sys.maxsize
        if value is not None and not least <= value <= most:
            raise BadInput(f"--{name} is {value}; it must be from {least} to {most}")

    def resolved(self, device_type: str, world_size: int) -> "Config":
        """Fill in what follows the device, and check the batch against the number of ranks.

        Args:
            device_type: "cuda", "mps" or "cpu".
            world_size: number of ranks.

        Returns:
            The same configuration with numbers wherever None stood, except `input_bin`, `input_val_bin`,
            `sample_every` and `output_dir`, which depend on more than the device.

        Raises:
            BadInput: total_batch_size is no multiple of B·T·ranks.
        """
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        values = {"backend": default_backend(device_type)} | BY_DEVICE[device_type] | given
        micro_batch = values["batch_size"] * values["sequence_length"] * world_size
        below = values["total_batch_size"] // micro_batch * micro_batch
        if below != values["total_batch_size"]:
            above = below + micro_batch
            if "total_batch_size" in given:
                nearest = f"{below} or {above}" if below else f"{above}"
                raise BadInput(
                    f"--total_batch_size {values['total_batch_size']} is no multiple of batch_size * sequence_length * "
                    f"ranks = {micro_batch}; the nearest that is: {nearest}"
                )
            values["total_batch_size"] = above
        if self.val_loss_every is None:
            has_validation = bool(self.input_val_bin) or (self.input_bin is None and self.input_val_bin is None)
            values["val_loss_every"] = 50 if has_validation else 0
        elif self.val_loss_every and self.input_bin is not None and self.input_val_bin is None:
            raise BadInput("--val_loss_every needs validation shards: give --input_val_bin, or --val_loss_every 0")
        return Config(**values)

    def deciding(self) -> dict[str, Any]:
        """The flags that decide what a run computes, whatever it computes on: what a resumed run has to share."""
        return {name: getattr(self, name) for name in DECIDING}

    def command_line(self, **changes: Any) -> str:
        """The arguments that give this configuration, with changes, for a shell."""
        config = dataclasses.replace(self, **changes)
        given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        given = {f.name: str(given[f.name]) for f in dataclasses.fields(config) if given[f.name] != f.default}
        # A value that begins with a dash would be taken for a flag.
        words = ([f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text] for name, text in given.items())
        return shlex.join(itertools.chain.from_iterable(words))

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-steps of one update."""
        return self.total_batch_size // (self.batch_size * self.sequence_length * world_size)


def default_backend(device_type: str) -> str:
    """triton where there is a GPU and triton is installed for it (it is not to be had on Windows)."""
    return "triton" if device_type == "cuda" and importlib.util.find_spec("triton") else "eager"


def shell_path(path: Path) -> str:
    """A path as a shell takes it, which no program takes for a flag, nor `--model` for a preset."""
    text = str(path)
    return shlex.quote(text if path.is_absolute() or ("/" in text and text[0] != "-") else f"./{text}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see python train.py --help")


def _reads(kind: type) -> Callable[[str], Any]:
    """int and float take the digits of every script, where a typing error is likelier than one that is meant."""

    def read(text: str) -> Any:
        if kind is not str and not text.isascii():
            raise ValueError
        return kind(text)

    read.__name__ = kind.__name__  # as argparse names it where the value is none
    return read


def parse(argv: list[str] | None = None) -> Config:
    """Read the command line.

    Args:
        argv: the arguments; None for those of the process.

    Raises:
        BadInput: an unknown flag or an impossible value.
    """
    parser = _Parser(
        prog="train.py",
        description="Pretrain GPT-2. Without any flag it trains on the spot, on a corpus that Python carries.",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind = next(kind for kind in (int, float, str) if kind.__name__ in str(field.type))
        default = field.default
        told = "" if default is None or "default" in field.metadata["help"] else f" (default: {default})"
        groups[group].add_argument(
            f"--{field.name}",
            type=_reads(kind),
            default=default,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else kind.__name__.upper(),
            help=(field.metadata["help"] + told).replace("%", "%%"),
        )
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if word.startswith("--") and word.endswith("=--"):  # argparse fails at it
            parser.error(f"argument {word.removesuffix('=--')}: -- is no value")
    return Config(**vars(parser.parse_args(argv)))
