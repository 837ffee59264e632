"""Judge a model as others do: `python -m evals TASK MODEL`.

TASK is hellaswag, lambada, wikitext or bpb (bits per byte); docs/evals.md states their rules. MODEL is a run directory,
a .bin file of llm.c, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder of transformers. Under torchrun the ranks
share the work. The same command resumes an evaluation that was killed.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from common import BadInput, exit_on_bad_input, exit_on_signal, lenient_streams, print0, print_error
from evals import read
from evals.hellaswag import RULES, write_bin
from evals.progress import Progress, fingerprint
from evals.score import score_items
from evals.tasks import NAMES, open_task, told
from kernels import ops
from model import llmc
from model.load import load
from training import distributed
from training.distributed import RunStopped, World

OUTPUT_DIR = Path("runs/evals")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see python -m evals --help")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 to 999999999")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring. Returns the exit status."""
    lenient_streams()
    parser = _Parser(prog="evals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=NAMES, metavar="TASK", help=f"One of {', '.join(NAMES)}.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="What is evaluated.")
    parser.add_argument("--data", help="Its file (default: downloaded; for bpb the embedded corpus's validation).")
    parser.add_argument("--rule", choices=RULES, default="llm.c", help="Of HellaSwag (default: llm.c).")
    parser.add_argument("--limit", type=_count, help="Evaluate only so many questions, passages or documents.")
    parser.add_argument(
        "--batch_size", type=_count, default=8, help="Full-length sequences in a forward pass (default: 8)."
    )
    parser.add_argument("--device", default="", help="cuda, mps or cpu (default: the first that is there).")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="Of matmuls (default: float32)."
    )
    parser.add_argument("--backend", help="As in train.py (default: triton on a GPU, eager elsewhere).")
    parser.add_argument("--output_dir", type=Path, help="Folder for results (default: the run's, or runs/evals).")
    parser.add_argument("--write_bin", type=Path, metavar="FILE", help="Write HellaSwag as llm.c's .bin file instead.")
    with exit_on_bad_input("evals"), exit_on_signal("evals"), contextlib.ExitStack() as held:
        args = parser.parse_args(argv)
        if args.task != "hellaswag" and (args.write_bin or args.rule != "llm.c"):
            raise BadInput(f"{'--write_bin' if args.write_bin else '--rule'} is of hellaswag alone; leave it out")
        if args.write_bin:
            n = write_bin(args.write_bin, Path(args.data) if args.data else read.fetch("hellaswag"))
            print0(f"{args.write_bin}: {n:,} questions for llm.c")
            return 0
        if not args.model:
            raise BadInput("no MODEL is given; name a run directory, a .bin file, gpt2, or a folder of transformers")
        if args.data == "":
            raise BadInput('--data is ""; give a file, or leave it out')
        try:
            world = distributed.start(args.device)
            evaluate(args, world, held)
            distributed.stop(world)
        except RunStopped as stopped:
            print_error(f"evals: {stopped}")
            return 1
    return 0


def evaluate(args: argparse.Namespace, world: World, held: contextlib.ExitStack) -> None:
    """Evaluate a model and write the results. Every rank takes part; the scores' file is locked until `held` ends."""
    backend = args.backend or ops.default_backend(world.device.type)
    try:
        table = ops.parse(backend, world.device.type)
    except (ImportError, ValueError, RuntimeError) as error:
        raise BadInput(f"--backend {backend}: {error}") from error
    gpt = load(args.model, table)
    task = open_task(args.task, args.data, gpt.config, world, args.rule, args.limit)
    settings = {"batch_size": args.batch_size, "dtype": args.dtype, "backend": backend, "device": world.device_name}
    is_run = os.path.exists(Path(args.model) / llmc.RUN_WEIGHTS)
    folder = args.output_dir or (Path(args.model) if is_run else OUTPUT_DIR)

    def begin() -> tuple:
        progress = Progress(folder, task, fingerprint(gpt, task, settings))
        return progress.fingerprint, progress.open(held)

    digest, done = distributed.on_main(world, begin)
    progress = Progress(folder, task, digest)
    if done:
        print0(f"resuming: {len(done):,} of {len(task.items):,} items are done")
    gpt.to(world.device)
    dtype = getattr(torch, args.dtype)
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    n_tokens = args.batch_size * gpt.config.block_size

    def keep(found: dict) -> None:
        if world.is_main:
            progress.keep(found)

    figures = task.figures(score_items(gpt, task, world, autocast, n_tokens, done, keep))
    results = {"task": task.name, "rule": task.rule, "model": args.model, "data": args.data, "limit": args.limit}
    results |= {"figures": figures, "items": len(task.items)} | settings | {"torch": torch.__version__}
    path = distributed.on_main(world, lambda: progress.finish(results))
    print0(f"{task.name} ({task.rule}), {args.model}: {told(figures)} (items: {len(task.items):,})")
    print0(f"results: {path}")


if __name__ == "__main__":
    sys.exit(main())
