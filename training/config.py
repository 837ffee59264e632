"""The flags of train.py, as one dataclass: what was given is checked here, and what was not is filled in."""

import argparse
import dataclasses
import itertools
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from common import BadInput
from kernels.ops import default_backend

CHECKPOINTS = "checkpoints"
"""folder of a run directory in which its checkpoints are, step_N"""
LARGEST = 1e12
"""of a float: the product of three still fits float32"""


def flag(
    default: Any,
    group: str,
    *,
    decides: bool,
    help: str,
    cpu: Any = None,
    cuda: Any = None,
    embedded: Any = None,
    least: float = 0,
    most: float | None = None,
    choices: tuple | None = None,
) -> Any:
    """A field of Config that is a flag of the same name, with everything that describes the flag.

    Args:
        default: None where it follows the device, or is not known before `Config.resolved`.
        group: under which --help lists it.
        decides: whether it decides what a run computes, so that a resumed run has to have the same value. There is no
            default: a new flag has to be classed.
        help: its documentation, a sentence.
        cpu: the default on a CPU and on mps, where it follows the device.
        cuda: the default on an NVIDIA GPU.
        embedded: the default on the embedded corpus, where `default` is for other shards.
        least: the smallest number allowed.
        most: the largest; None for the largest of its type.
        choices: all values allowed, where those are few.
    """
    metadata = {"group": group, "decides": decides, "help": help, "least": least, "most": most, "choices": choices}
    metadata |= {"by_device": {"cpu": cpu, "mps": cpu, "cuda": cuda}, "elsewhere": default, "embedded": embedded}
    return dataclasses.field(default=None if embedded is not None else default, metadata=metadata)


def switch(group: str, *, decides: bool, help: str) -> Any:
    """A flag that is 0 or 1, and 0 unless it is given."""
    return flag(0, group, decides=decides, help=help, choices=(0, 1))


def is_checkpoint(path: Path) -> bool:
    """Whether it bears the name of a checkpoint."""
    return bool(re.fullmatch(r"step_(0|[1-9][0-9]*)", path.name))


class Resume(NamedTuple):
    """What `--resume` asks for: to start from scratch (neither `auto` nor a `path`), or from a checkpoint."""

    given: str
    """the flag's value, for messages"""
    auto: bool = False
    """from the newest intact checkpoint in --output_dir, or from scratch if it has none"""
    path: Path | None = None
    """from this checkpoint, or the newest of this run directory"""

    @classmethod
    def parse(cls, given: str) -> "Resume":
        """Interpret the flag's value. Nothing is looked up on the disk."""
        return cls(given, given == "auto", None if given in ("0", "auto") else Path(given).absolute())

    @property
    def is_checkpoint(self) -> bool:
        """Whether `path` has the name of a checkpoint, and not of a run directory."""
        return self.path is not None and is_checkpoint(self.path)

    @property
    def run(self) -> Path | None:
        """The run directory that `path` is or is in; None for a checkpoint that is in none."""
        if self.path is None or not self.is_checkpoint:
            return self.path
        return self.path.parent.parent if self.path.parent.name == CHECKPOINTS else None


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Types are those of a run: before `resolved` and `with_batch`, a field may be None.

    Raises:
        BadInput: a value is impossible whatever the device and the model.
    """

    # fmt: off
    model: str = flag(None, "model", decides=False, cpu="nano", cuda="d12",  # the network's shape is compared instead
        help="What to train: nano, d12, d24, d36 or d48 (random weights); gpt2, gpt2-medium, gpt2-large, gpt2-xl, a "
        "hub name or a folder of transformers (pretrained); a .bin file of llm.c or a run directory.")
    backend: str = flag(None, "model", decides=False,
        help="What computes the ops: triton, eager, or sdpa (eager with attention by scaled_dot_product_attention), "
        "and exceptions by op, as in triton,attention=sdpa (default: triton on a GPU, eager elsewhere).")
    flash: int = switch("model", decides=False,
        help="llm.c's name for --backend sdpa: 1 makes eager attention sdpa, and is refused where attention is a "
        "Triton kernel.")

    input_bin: str | None = flag(None, "data", decides=False,  # the shards are compared instead
        help="Glob of the training shards (default: the embedded corpus, tokenised on first use).")
    input_val_bin: str | None = flag(None, "data", decides=False,
        help='Glob of the validation shards; "" for none (default: none, or the embedded corpus\'s own).')
    shuffle: int = flag(0, "data", decides=True, embedded=1, choices=(0, 1),
        help="1 reads shards and sequences in an order drawn for each epoch, the same for any number of ranks; 0 in "
        "the order on disk, as llm.c.")
    overfit_single_batch: int = switch("data", decides=True,
        help="1 trains on the first batch over and over, to see the loss fall.")

    batch_size: int = flag(None, "batch", decides=False, cpu=8, least=1,
        help="Sequences in a micro-batch of one rank, B (default: 8; on a GPU the largest power of two that takes at "
        "most 60% of its memory, by the formula in training/memory.py, and of which the data holds eight).")
    sequence_length: int = flag(None, "batch", decides=True, cpu=128, cuda=1024, least=1,
        help="Tokens in a sequence, T.")
    total_batch_size: int = flag(None, "batch", decides=True, least=1,
        help="Tokens per update over all ranks, a multiple of B*T*ranks (default: B*T*ranks).")

    num_iterations: int = flag(200, "optimisation", decides=True,
        help="Number of updates.")
    learning_rate: float = flag(None, "optimisation", decides=True, cpu=2e-3, cuda=6e-4,
        help="Peak learning rate.")
    warmup_iters: int = flag(0, "optimisation", decides=True, embedded=10,
        help="Updates over which the learning rate rises linearly.")
    learning_rate_decay_frac: float = flag(1.0, "optimisation", decides=True, embedded=0.1,
        help="Fraction of the learning rate at which the cosine ends; 1 keeps it constant.")
    weight_decay: float = flag(0.0, "optimisation", decides=True,
        help="AdamW's decay of the tensors of two or more dimensions.")
    grad_clip: float = flag(1.0, "optimisation", decides=True,
        help="Largest norm of the gradient; 0 does not clip.")
    skip_loss_z: float = flag(0.0, "optimisation", decides=True,
        help="Skip an update whose loss is more than this many standard deviations above the mean of the last 128; 0 "
        "skips only losses that are not finite.")
    skip_norm_z: float = flag(0.0, "optimisation", decides=True,
        help="The same for the norm of the gradient before it is clipped.")

    val_loss_every: int = flag(None, "evaluation", decides=False,
        help="Steps between validations; 0 for none (default: 50 where there are validation shards).")
    val_max_steps: int = flag(20, "evaluation", decides=False, least=1,
        help="Batches of a validation, on each rank.")
    sample_every: int | None = flag(None, "evaluation", decides=False,
        help="Steps between samples; 0 for none (default: 100 for GPT-2's vocabulary).")
    eval_every: int = flag(0, "evaluation", decides=False,
        help="Steps between evaluations by --evals; 0 for none.")
    evals: str = flag("", "evaluation", decides=False,
        help="What --eval_every evaluates: hellaswag (llm.c's rule), lambada, wikitext and bpb, separated by commas; "
        "each may name its file, as in hellaswag=hellaswag_val.bin,bpb=notes.txt (default: downloaded; for bpb the "
        "embedded corpus's validation shards).")
    inference_only: int = switch("evaluation", decides=False,
        help="1 measures forward passes only; nothing is trained.")
    check: int = switch("evaluation", decides=False,
        help="1 compares the backend with eager on one batch, op by op and parameter by parameter, and exits with 1 if "
        "one is off; nothing is trained or written.")

    device: str = flag("", "machine", decides=False,
        help="cuda, mps or cpu (default: the first of them that is there).")
    dtype: str = flag(None, "machine", decides=True, cpu="float32", cuda="bfloat16",
        choices=("float32", "float16", "bfloat16"),
        help="Type of the matmuls; below float32, autocast around the forward pass.")
    residual_dtype: str = flag("float32", "machine", decides=True, choices=("float32", "bfloat16"),
        help="Type of the residual stream; bfloat16 halves what LayerNorms move, and needs --dtype bfloat16.")
    tensorcores: int = switch("machine", decides=False,
        help="1 lets float32 matmuls round their inputs to TF32.")
    compile: int = switch("machine", decides=False,
        help="1 compiles the model with torch.compile.")
    cuda_graph: int = switch("machine", decides=False,
        help="1 launches the kernels of an update as CUDA graphs, for small batches and networks, where the GPU would "
        "wait for Python; one process on an NVIDIA GPU, not for float16.")
    recompute: int = flag(0, "machine", decides=False, choices=(0, 1, 2),
        help="What the backward pass recomputes instead of saving it: 0 nothing, 1 GELUs, 2 also LayerNorms.")
    zero_stage: int = flag(0, "machine", decides=False, choices=(0, 1, 2, 3),
        help="What is sharded over the ranks of torchrun: 0 nothing, 1 the optimizer state, 2 also gradients, 3 also "
        "parameters.")
    timeout_s: int = flag(600, "machine", decides=False, least=1, most=10**9,  # torch counts nanoseconds in 64 bits
        help="Seconds that a rank waits for the others before it gives up and says why.")
    check_ranks_every: int = flag(0, "machine", decides=False,
        help="Steps between comparisons of the ranks' weights, which stop the run where they differ; 0 for none.")

    checkpoint_every: int = flag(0, "checkpoints", decides=False,
        help="Steps between checkpoints; 0 saves only when SIGTERM, SIGUSR1 or SIGHUP ends the run.")
    keep: int = flag(2, "checkpoints", decides=False, least=1,
        help="How many of the newest checkpoints are kept.")
    keep_every: int = flag(0, "checkpoints", decides=False,
        help="Checkpoints of steps that are a multiple of this are kept as well; 0 for none.")
    resume: str = flag("0", "checkpoints", decides=False,
        help="auto resumes from the newest intact checkpoint in --output_dir, or starts from scratch if it has none; a "
        "path resumes from that checkpoint, or from the newest of that run directory, and writes to the same run "
        "directory unless --output_dir names a new folder; 0 starts from scratch.")
    resume_override: int = switch("checkpoints", decides=False,
        help="1 resumes although data order, batch or schedule differ from the checkpoint's.")

    output_dir: str | None = flag(None, "output", decides=False,
        help='Folder for everything that the run writes; "" writes nothing (default: a new one under runs/).')
    write_tensors: int = switch("output", decides=False,
        help="1 writes the first weights, a debug state and the tokenizer in llm.c's formats.")
    tensorboard: int = switch("output", decides=False,
        help="1 writes TensorBoard events too (needs the extra: tensorboard).")
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kind, value, least = _type_of(field), getattr(self, field.name), field.metadata["least"]
            most = field.metadata["most"] or (sys.maxsize if kind is int else LARGEST)
            if kind is not str and value is not None and not least <= value <= most:
                raise BadInput(f"--{field.name} is {value}; it must be from {kind(least)} to {most}")
        if self.model == "":
            raise BadInput('--model is ""; give a preset, a name or a path, or leave it out')
        if self.input_bin == "":
            raise BadInput('--input_bin is ""; give a glob of shards, or leave it out for the embedded corpus')
        if self.val_loss_every and self.input_val_bin == "":
            raise BadInput("--val_loss_every needs validation shards: give --input_val_bin, or --val_loss_every 0")
        if bool(self.eval_every) != bool(self.evals):
            given, other = ("--eval_every", "--evals") if self.eval_every else ("--evals", "--eval_every")
            raise BadInput(f"{given} does nothing without {other}; give both, or leave both out")
        if self.output_dir == "" and (self.write_tensors or self.tensorboard):
            name = "write_tensors" if self.write_tensors else "tensorboard"
            raise BadInput(f'--{name} 1 has nowhere to write to: give an --output_dir that is not ""')
        if self.checkpoint_every and self.output_dir == "":
            raise BadInput('--checkpoint_every has nowhere to write to: give an --output_dir that is not ""')
        if self.checkpoint_every and self.inference_only:
            raise BadInput("--checkpoint_every has nothing to save with --inference_only 1; leave one of them out")
        if self.residual_dtype != "float32" and self.dtype not in (None, self.residual_dtype):
            raise BadInput(
                f"--residual_dtype {self.residual_dtype} needs matmuls of the same type, and --dtype is {self.dtype}; "
                f"give --dtype {self.residual_dtype}, or --residual_dtype float32"
            )
        if self.cuda_graph and self.dtype == "float16":
            raise BadInput(
                "--cuda_graph 1 does not go with --dtype float16, since GradScaler follows each step on the host; give "
                "--dtype bfloat16, or --cuda_graph 0"
            )
        if self.cuda_graph and self.inference_only:
            raise BadInput("--cuda_graph captures updates, and --inference_only 1 makes none; leave one of them out")
        if self.resume == "":
            raise BadInput('--resume is ""; give auto, the path of a checkpoint or a run directory, or 0')
        if self.resume_from.auto and not self.output_dir:
            raise BadInput("--resume auto needs an --output_dir: the run to resume")
        if (self.resume_from.auto or self.resume_from.path) and self.inference_only:
            raise BadInput("--resume continues a training run; leave it or --inference_only 1 out")

    @property
    def resume_from(self) -> Resume:
        """What `--resume` asks for."""
        return Resume.parse(self.resume)

    def resolved(self, device_type: str) -> "Config":
        """Fill in what follows the device and the corpus.

        Args:
            device_type: "cuda", "mps" or "cpu".

        Returns:
            The same configuration with values wherever None stood, except the batch, for which see `with_batch`, and
            `input_bin`, `input_val_bin`, `sample_every` and `output_dir`, which depend on more.

        Raises:
            BadInput: values that do not go together on this device.
        """
        values: dict[str, Any] = {"backend": default_backend(device_type)}
        for field in dataclasses.fields(self):
            value, facts = getattr(self, field.name), field.metadata
            if value is None:
                value = facts["by_device"][device_type]
            if value is None:
                value = facts["embedded"] if self.input_bin is None else facts["elsewhere"]
            if value is not None:
                values[field.name] = value
        has_validation = bool(self.input_val_bin) or (self.input_bin is None and self.input_val_bin is None)
        if self.val_loss_every is None:
            values["val_loss_every"] = 50 if has_validation else 0
        elif self.val_loss_every and not has_validation:
            raise BadInput("--val_loss_every needs validation shards: give --input_val_bin, or --val_loss_every 0")
        return Config(**values)

    def with_batch(self, world_size: int, largest: Callable[[], int]) -> "Config":
        """Fill in the batch, and check it against the number of ranks.

        Args:
            world_size: number of ranks.
            largest: returns the batch_size to take where neither a flag nor the device gives one.

        Raises:
            BadInput: total_batch_size is no multiple of B·T·ranks.
        """
        B, total = self.batch_size, self.total_batch_size
        if B is None:
            B = largest()
            while total is not None and B > 1 and total % (B * self.sequence_length * world_size):
                B //= 2
        micro_batch = B * self.sequence_length * world_size
        total = micro_batch if total is None else total
        below = total // micro_batch * micro_batch
        if below != total:
            nearest = f"{below} or {below + micro_batch}" if below else f"{micro_batch}"
            raise BadInput(
                f"--total_batch_size {total} is no multiple of batch_size * sequence_length * ranks = {micro_batch}; "
                f"the nearest that is: {nearest}"
            )
        return dataclasses.replace(self, batch_size=B, total_batch_size=total)

    def deciding(self) -> dict[str, Any]:
        """The flags that decide what a run computes, whatever it computes on: what a resumed run has to share."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["decides"]}

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


def shell_path(path: Path) -> str:
    """A path as a shell takes it, which no program takes for a flag, nor `--model` for a preset."""
    text = str(path)
    return shlex.quote(text if path.is_absolute() or ("/" in text and text[0] != "-") else f"./{text}")


def _type_of(field: dataclasses.Field) -> type:
    return next(kind for kind in (int, float, str) if kind.__name__ in str(field.type))


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
        kind, facts = _type_of(field), field.metadata
        told = f" (default: {facts['elsewhere']})"
        if facts["embedded"] is not None:
            told = f" (default: {facts['elsewhere']}; on the embedded corpus {facts['embedded']})"
        elif facts["by_device"]["cpu"] is not None:
            told = f" (default: {facts['by_device']['cpu']}; on a GPU {facts['by_device']['cuda']})"
        groups[group].add_argument(
            f"--{field.name}",
            type=_reads(kind),
            default=field.default,
            choices=facts["choices"],
            metavar=None if facts["choices"] else kind.__name__.upper(),
            help=(facts["help"] + ("" if "default" in facts["help"] else told)).replace("%", "%%"),
        )
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if word.startswith("--") and word.endswith("=--"):  # argparse fails at it
            parser.error(f"argument {word.removesuffix('=--')}: -- is no value")
    return Config(**vars(parser.parse_args(argv)))
