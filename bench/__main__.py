"""`python -m bench` lists what can be run."""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench import results
from bench.harness import CudaDevice, Device
from bench.results import RESULTS, Row, compare, folder, read, write
from bench.tables import table
from common import BadInput, exit_on_bad_input

COMMANDS = {
    "kernels": "time ops against their baselines (needs a GPU)",
    "step": "time a training step, and where its time goes (needs a GPU)",
    "all": "step, then kernels; the next call resumes (needs a GPU)",
    "tune": "search launch configurations of ops; without a GPU, list those that fit",
    "generate": "tokens per second of d12 against transformers, on the CPU",
    "compare": "rows whose time moved beyond its spread",
    "report": "write the table in README, and the pictures, from the rows",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m bench", description="How fast: timed on a GPU, tuned and compared.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    of = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    of["kernels"].add_argument("ops", nargs="*", default=["all"], metavar="OP", help="of bench/ops.py (default: all)")
    of["tune"].add_argument("ops", nargs="+", metavar="OP", help="of bench/ops.py, or all")
    of["tune"].add_argument("--shape", help="one of the op's (default: its first)")
    of["tune"].add_argument("--capability", type=int, help="to compile for, as in 90 (default: the GPU's, or 90)")
    for name in ("kernels", "all", "tune"):
        of[name].add_argument("--minutes", type=float, default=9.0, help="when to stop (default: 9)")
    of["step"].add_argument("variants", nargs="*", metavar="VARIANT", help="of bench/variants.py (default: all)")
    for name in ("step", "all"):
        of[name].add_argument("--model", default="d12", help="a preset (default: d12)")
        of[name].add_argument("--batch_size", type=int, help="B (default: 64, then 16, where all fit 80 GB)")
        of[name].add_argument("--sequence_length", type=int, default=1024, help="T (default: 1024)")
        of[name].add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
        of[name].add_argument("--trace", type=Path, help="a file for a Chrome trace of the first variant")
    of["generate"].add_argument("--rounds", type=int, default=5, help="through all, in turns (default: 5)")
    of["compare"].add_argument("before", type=Path, help="a CSV file, or a folder of them")
    of["compare"].add_argument("after", type=Path)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status: 1 where something got slower, 2 for bad input."""
    arguments = parser().parse_args(argv)
    with exit_on_bad_input("python -m bench"):
        match arguments.command:
            case None:
                print("\n".join(f"python -m bench {name:9}{text}" for name, text in COMMANDS.items()))
                return 0
            case "tune":
                compile_kernels("tune")
                from bench import tune

                return tune.main(arguments, CudaDevice() if torch.cuda.is_available() else None)
            case "generate":
                from bench import generate

                return generate.main(max(arguments.rounds, 1))
            case "compare":
                return compare(arguments.before, arguments.after)
            case "report":
                from bench import report

                return report.main()
        device = need_gpu(arguments.command)
        stop_at = time.monotonic() + 60 * getattr(arguments, "minutes", 0)
        if arguments.command != "kernels":
            time_step(arguments, device)
        if arguments.command != "step":
            time_kernels(getattr(arguments, "ops", ["all"]), stop_at, device)
    return 0


def need_gpu(command: str) -> Device:
    """The GPU to time on.

    Raises:
        BadInput: there is none, or this process interprets kernels.
    """
    if not torch.cuda.is_available():
        raise BadInput(f"{command} needs an NVIDIA GPU to time on; `pytest tests/budgets -s` counts without one")
    compile_kernels(command)
    return CudaDevice()


def compile_kernels(command: str) -> None:
    """Have kernels compiled in this process.

    Raises:
        BadInput: it interprets them already, or there is no triton.
    """
    from kernels import interpreter

    try:
        interpreter.choose("cuda")
    except (ImportError, RuntimeError) as error:
        raise BadInput(f"{command}: {error}") from error


def time_step(arguments: argparse.Namespace, device: Device, to: Path = RESULTS) -> None:
    """Time the variants of a training step and write their rows.

    Raises:
        BadInput: there is no such preset or variant.
    """
    from bench import variants

    if arguments.model not in variants.PRESETS:
        raise BadInput(f"--model {arguments.model} is no preset; choose from {', '.join(variants.PRESETS)}")
    names = getattr(arguments, "variants", []) or list(variants.VARIANTS)
    for name in names:
        if name not in variants.VARIANTS:
            raise BadInput(f"unknown variant {name!r}; choose from {', '.join(map(repr, variants.VARIANTS))}")
    path = folder(device.gpu, to) / "step.csv"
    dtype = getattr(torch, arguments.dtype)
    batch_sizes = variants.BATCH_SIZES if arguments.batch_size is None else [arguments.batch_size]
    chrome_trace = arguments.trace
    for batch_size in batch_sizes:
        tokens = (batch_size, arguments.sequence_length)
        key = {"op": "step", "shape": variants.shape_name(arguments.model, tokens), "dtype": arguments.dtype}
        if arguments.command == "all" and _is_done(path, **key):
            continue
        rows = variants.measure(arguments.model, tokens, dtype, device, names, chrome_trace=chrome_trace)
        write(path, rows)
        _show(rows)
        chrome_trace = None


def time_kernels(
    names: Iterable[str], stop_at: float, device: Device, to: Path = RESULTS, now: Callable[[], float] = time.monotonic
) -> None:
    """Time case after case, and stop before one that would not end in time. Skips what is measured at this commit."""
    from bench import harness, ops

    cases = list(harness.cases(ops.named(names)))
    longest, left = 0.0, 0
    for benchmark, shape, dtype in cases:
        path = folder(device.gpu, to) / f"{benchmark.op}.csv"
        if _is_done(path, op=benchmark.op, shape=shape.name, dtype=str(dtype).partition(".")[2]):
            continue
        started = now()
        if left or started + longest > stop_at:
            left += 1
            continue
        rows = harness.measure(benchmark, shape, dtype, device)
        write(path, rows)
        _show(rows)
        longest = max(longest, now() - started)
    print(f"{left} of {len(cases)} cases are left; the same command resumes" if left else "all cases are measured")


def _is_done(path: Path, **key: str) -> bool:
    """Whether there are rows of this commit."""
    if not path.exists():
        return False
    commit = results.commit()
    rows = [row for row in read(path) if all(getattr(row, name) == value for name, value in key.items())]
    return bool(rows) and not commit.endswith("+") and all(row.commit == commit for row in rows)


def _show(rows: Iterable[Row]) -> None:
    def line(row: Row) -> tuple:
        rate = 1e-9 / (1e-3 * row.p50) if row.p50 else None
        percent = f"{row.percent:.0f}%" if row.percent is not None else ""
        return *row.key, row.p50, rate and rate * row.bytes, rate and rate * row.flops / 1e3, percent, row.note

    header = ["op", "pass", "variant", "shape", "dtype", "ms", "GB/s", "TFLOP/s", "of the ceiling", "note"]
    print(table(header, map(line, rows)), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
