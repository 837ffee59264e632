"""`python -m bench` lists what there is."""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench.results import RESULTS, compare, folder, read, write
from common import BadInput, exit_on_bad_input

COMMANDS = {
    "kernels": "time the ops against their peers (a GPU): [OP ...]",
    "step": "time a training step, and where its time goes (a GPU)",
    "all": "kernels and step, for so many minutes; the next call goes on (a GPU)",
    "tune": "sweep the launch configurations of OP ... or all: compiled and listed, timed where there is a GPU",
    "resources": "registers, spills, shared memory, occupancy, access widths, matrix instructions; compiled",
    "traffic": "bytes that kernels ask for, beside compulsory bytes; interpreted",
    "memory": "what is kept for backward, and what is alive; traced",
    "launches": "kernels that a training step launches, by name, and their bytes; traced",
    "roofline": "predicted time of every op and of the step; traced, with what was measured beside it",
    "report": "the table of README and the pictures, from the rows",
    "compare": "rows that moved beyond their spread: A B, files or folders",
}
COUNTED = ("resources", "traffic", "memory", "launches", "roofline")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m bench", description="Measurements, and what can be known without a GPU."
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    of = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    of["kernels"].add_argument("ops", nargs="*", metavar="OP", help="ops to time (default: all)")
    of["tune"].add_argument("ops", nargs="+", metavar="OP", help="ops to tune, or all")
    of["tune"].add_argument("--shape", metavar="NAME", help="a shape of the op (default: its first)")
    of["tune"].add_argument("--capability", type=int, help="10 x the compute capability (default: the GPU's, or 90)")
    for name in ("kernels", "all", "tune"):
        of[name].add_argument("--minutes", type=float, default=9.0, help="when to stop (default: 9)")
    for name in ("step", "all"):
        of[name].add_argument("--model", default="d12", help="a preset (default: d12)")
        of[name].add_argument("--batch_size", type=int, help="B (default: 64, then 16, where all fit 80 GB)")
        of[name].add_argument("--sequence_length", type=int, default=1024, help="T (default: 1024)")
        of[name].add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
        of[name].add_argument("--trace", type=Path, help="a file for a Chrome trace of the first variant")
    of["step"].add_argument("variants", nargs="*", metavar="VARIANT", help="ways to make the step (default: all)")
    for name in COUNTED:
        of[name].add_argument("--save", action="store_true", help="write the picture to bench/results/predicted")
    of["compare"].add_argument("before", type=Path)
    of["compare"].add_argument("after", type=Path)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status: 1 where a limit is broken, 2 for bad input."""
    arguments = parser().parse_args(argv)
    with exit_on_bad_input("python -m bench"):
        match arguments.command:
            case None:
                print("\n".join(f"python -m bench {name:10} {text}" for name, text in COMMANDS.items()))
                return 0
            case "compare":
                return compare(arguments.before, arguments.after)
            case "report":
                from bench import report

                return report.main()
            case "traffic":
                from bench import traffic

                return traffic.main(arguments.save)
            case "tune":
                device = need_gpu("tune") if torch.cuda.is_available() else compile_kernels("tune")
                from bench import tune

                return tune.main(arguments, device)
            case "resources" | "memory" | "launches" | "roofline":
                return counted(arguments.command, arguments.save)
            case _:
                return timed(arguments, need_gpu(arguments.command))


def counted(command: str, save: bool) -> int:
    """Run what looks at compiled kernels."""
    compile_kernels(command)
    from bench import launches, memory, resources, roofline

    modules = {"resources": resources, "memory": memory, "launches": launches, "roofline": roofline}
    return modules[command].main(save)


def compile_kernels(command: str) -> None:
    """Have kernels compiled, not interpreted.

    Raises:
        BadInput: this process interprets them already, or there is no triton.
    """
    from kernels import interpreter

    try:
        interpreter.choose("cuda")
    except (ImportError, RuntimeError) as error:
        raise BadInput(f"{command} looks at compiled kernels: {error}") from error


def need_gpu(command: str):
    """The GPU to time on.

    Raises:
        BadInput: there is none.
    """
    if not torch.cuda.is_available():
        raise BadInput(f"{command} needs an NVIDIA GPU to time on; without one there are {', '.join(COUNTED)}")
    from kernels import interpreter

    try:
        interpreter.choose("cuda")
    except (ImportError, RuntimeError) as error:
        raise BadInput(f"{command}: {error}") from error
    from bench.harness import CudaDevice

    return CudaDevice()


def timed(arguments: argparse.Namespace, device) -> int:
    """Run what needs a clock."""
    from model.gpt import PRESETS

    stop_at = time.monotonic() + 60 * getattr(arguments, "minutes", float("inf"))
    if arguments.command != "kernels":
        if arguments.model not in PRESETS:
            raise BadInput(f"--model {arguments.model} is no preset; choose from {', '.join(PRESETS)}")
        time_step(arguments, device)
    if arguments.command != "step":
        time_kernels(getattr(arguments, "ops", []), stop_at, device)
    return 0


def time_step(arguments: argparse.Namespace, device, results: Path = RESULTS) -> None:
    """Time the variants of a training step and write their rows."""
    from bench import step

    variants = getattr(arguments, "variants", []) or list(step.VARIANTS)
    for variant in variants:
        if variant not in step.VARIANTS:
            raise BadInput(f"unknown variant {variant!r}; choose from {', '.join(map(repr, step.VARIANTS))}")
    path = folder(device.gpu, results) / "step.csv"
    dtype = getattr(torch, arguments.dtype)
    batch_sizes = step.BATCH_SIZES if arguments.batch_size is None else [arguments.batch_size]
    chrome_trace = arguments.trace
    for batch_size in batch_sizes:
        tokens = (batch_size, arguments.sequence_length)
        key = {"op": "step", "shape": step.shape_name(arguments.model, tokens), "dtype": arguments.dtype}
        if arguments.command == "all" and _is_done(path, **key):
            continue
        rows = step.measure(arguments.model, tokens, dtype, device, variants, chrome_trace=chrome_trace)
        write(path, rows)
        _show(rows)
        chrome_trace = None


def time_kernels(
    ops: Iterable[str], stop_at: float, device, results: Path = RESULTS, clock: Callable[[], float] = time.monotonic
) -> None:
    """Time case after case, and stop before one that would not end in time; what is measured at this commit is skipped.

    Raises:
        BadInput: there is no such op.
    """
    from bench import harness
    from bench.suite import BENCHMARKS

    known = {benchmark.op for benchmark in BENCHMARKS}
    for op in ops:
        if op not in known:
            raise BadInput(f"unknown op {op!r}; choose from {', '.join(sorted(known))}")
    cases = list(harness.cases(b for b in BENCHMARKS if b.op in (ops or known)))
    longest, left = 0.0, 0
    for benchmark, shape, dtype in cases:
        path = folder(device.gpu, results) / f"{benchmark.op}.csv"
        if _is_done(path, op=benchmark.op, shape=shape.name, dtype=str(dtype).partition(".")[2]):
            continue
        started = clock()
        if left or started + longest > stop_at:
            left += 1
            continue
        rows = harness.measure(benchmark, shape, dtype, device)
        write(path, rows)
        _show(rows)
        longest = max(longest, clock() - started)
    print(f"{left} of {len(cases)} cases are left; the same command goes on" if left else "all cases are measured")


def _is_done(path: Path, **key: str) -> bool:
    """Whether there are rows of this commit."""
    from bench.results import commit

    if not path.exists():
        return False
    now = commit()
    rows = [row for row in read(path) if all(getattr(row, name) == value for name, value in key.items())]
    return bool(rows) and not now.endswith("+") and all(row.commit == now for row in rows)


def _show(rows: Iterable) -> None:
    from bench.tables import table

    def line(row) -> tuple:
        rate = 1e-9 / (1e-3 * row.p50) if row.p50 else None
        percent = f"{row.percent:.0f}%" if row.percent is not None else ""
        return *row.key, row.p50, rate and rate * row.bytes, rate and rate * row.flops / 1e3, percent, row.note

    header = ["op", "direction", "peer", "shape", "dtype", "ms", "GB/s", "TFLOP/s", "of the ceiling", "note"]
    print(table(header, map(line, rows)), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
