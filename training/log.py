"""What a run leaves behind: main.log, metrics.jsonl, loss.png, and TensorBoard events on request.

Step N is the N-th update, and the moment after it: N updates are done. Only main.log counts updates from 0, as llm.c's
does: there, `s:N trl` is the training loss of step N + 1, and `s:N tel` the validation loss after step N.
"""

import contextlib
import io
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from common import BadInput, atomic_write, print0, write_errors
from readers import integer, open_regular, parse_json, require

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

LONGEST_LINE = 1 << 16
"""bytes of a line of metrics.jsonl"""
DRAW_EVERY_S = 10
"""seconds between pictures during a run: a picture takes longer than a step of a small network"""
UPDATES = ("trl", "metrics")
"""kinds of lines that belong to an update; the others are about the weights after one"""


class RunLog:
    """Records of one run, written as they come in, so that they are complete up to whatever stops the run.

    A full disk or a missing folder does not stop the run: a warning is printed, and lines wait until they can be
    written. Nor does any failure in matplotlib or TensorBoard.

    Args:
        output_dir: an existing folder, or None to write nothing.
        title: of loss.png.
    """

    def __init__(self, output_dir: Path | None, title: str = ""):
        self.output_dir = output_dir
        self.title = title
        self._waiting = {"main.log": b"", "metrics.jsonl": b""}
        self._refused: set[str] = set()
        self.train_losses: list[tuple[int, float]] = []
        self.val_losses: list[tuple[int, float]] = []
        self._drawn = 0
        """number of losses in the picture"""
        self._drawn_at = time.monotonic()
        self._events = None

    def open(self, steps_done: int = 0, tensorboard: bool = False) -> "RunLog":
        """Continue the records of a run, truncated to the steps that are done.

        Lines that a power failure or an editor has damaged are left out, and a warning says how many.

        Args:
            steps_done: 0 for a new run.
            tensorboard: write TensorBoard events as well.

        Raises:
            BadInput: earlier logs cannot be read or truncated, or tensorboard is not installed.
        """
        if self.output_dir:
            if tensorboard:
                summary_writer = _tensorboard_writer()
                with self._warning("events.out.tfevents*"):
                    # It drops the events of the last step too: `_truncate` adds those of the update again, and the
                    # validation will be repeated.
                    self._events = summary_writer(str(self.output_dir), purge_step=steps_done)
            self._truncate(steps_done)
        return self

    def train(self, metrics: dict[str, Any]) -> None:
        """Record an update: its `step`, from 1, its `loss` in nats, and what else there is, as a line of metrics.jsonl.

        A number that is not finite becomes null, which is what JSON has for it.
        """
        step, loss = metrics["step"], metrics["loss"]
        self.train_losses.append((step, loss))
        self._append("main.log", f"s:{step - 1} trl:{loss:.6f}\n")
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}
        self._append("metrics.jsonl", json.dumps(finite) + "\n")
        self._add_metrics(finite)

    def validation(self, step: int, loss: float) -> None:
        """Record the validation loss after a step, in nats. Draw loss.png if the log, or the last one, is DRAW_EVERY_S
        old."""
        self.val_losses.append((step, loss))
        self._append("main.log", f"s:{step} tel:{loss:.6f}\n")
        self._add_scalars(step, {"validation/loss": loss})
        if time.monotonic() - self._drawn_at >= DRAW_EVERY_S:
            self.draw()

    def evaluation(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        """Record the figures of evaluations after a step, by evaluation, as a line of metrics.jsonl."""
        finite = {
            task: {name: value if math.isfinite(value) else None for name, value in of_task.items()}
            for task, of_task in figures.items()
        }
        self._append("metrics.jsonl", json.dumps({"step": step, "evals": finite}) + "\n")
        for task, of_task in finite.items():
            self._add_scalars(step, {f"{task}/{name}": value for name, value in of_task.items()})

    def draw(self) -> None:
        """Draw training and validation loss over steps into loss.png."""
        n_losses = len(self.train_losses) + len(self.val_losses)
        if not self.output_dir or n_losses == self._drawn:
            return
        with self._warning("loss.png"), warnings.catch_warnings(), atomic_write(self._path("loss.png")) as file:
            warnings.simplefilter("ignore")  # about glyphs that the font lacks
            figure = self._figure()
            figure.savefig(file, format="png", dpi=120)
            self._drawn, self._drawn_at = n_losses, time.monotonic()

    def _figure(self) -> Any:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if it cannot write its cache of fonts
        from matplotlib.figure import Figure  # here, because the user's settings may make the import fail

        figure = Figure(figsize=(8, 4.5))
        axes = figure.add_axes((0.08, 0.12, 0.9, 0.8))  # computing a layout takes as long as the rest
        if self.train_losses:
            axes.plot(*zip(*self.train_losses, strict=True), color="tab:blue", linewidth=1, label="training")
        if self.val_losses:
            axes.plot(*zip(*self.val_losses, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
            step, loss = self.val_losses[-1]
            axes.annotate(f"{loss:.3f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="right")
        axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
        title = self.title.encode(errors="backslashreplace").decode()  # a path may not be UTF-8
        axes.set_title(title, parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def sync(self) -> None:
        """Make the lines survive a power failure."""
        for name in self._waiting:
            if self.output_dir:
                with self._warning(name), open(self._path(name), "ab") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Draw the last picture and write the lines that wait."""
        self.draw()
        for name in self._waiting:
            self._append(name, "")
        if self._events:
            with self._warning("events.out.tfevents*"):
                self._events.close()

    def _truncate(self, steps_done: int) -> None:
        """Drop damaged lines, and those of steps that will be repeated; keep the losses of the others for loss.png."""
        found = {
            name: [(line, parse(line)) for line in io.BytesIO(self._content(name))]
            for name, parse in (("main.log", _parse_main), ("metrics.jsonl", _parse_metrics))
        }
        updates, steps = (
            [parsed.step for _, parsed in lines if parsed and parsed.kind in UPDATES] for lines in found.values()
        )
        if steps_done and steps and (steps[0] == 0 or steps == [step - 1 for step in updates]):
            raise BadInput(f"{self._path('metrics.jsonl')} counts steps from 0, as earlier versions did; move it away")
        for name, lines in found.items():
            content = bytearray()
            for line, parsed in lines:
                # Validation and evaluations after the last step are still to come.
                if steps_done and parsed and parsed.step <= steps_done - (parsed.kind not in UPDATES):
                    content += line
                    if parsed.kind == "trl":
                        self.train_losses.append((parsed.step, parsed.loss))
                    elif parsed.kind == "tel":
                        self.val_losses.append((parsed.step, parsed.loss))
                    elif parsed.step == steps_done:
                        self._add_metrics(json.loads(line))
            damaged = sum(parsed is None for _, parsed in lines)
            if damaged:
                print0(f"warning: {self._path(name)}: lines that cannot be read are left out: {damaged}")
            if len(content) < sum(len(line) for line, _ in lines):
                with atomic_write(self._path(name)) as file:
                    file.write(content)

    def _path(self, name: str) -> Path:
        assert self.output_dir
        return self.output_dir / name

    def _content(self, name: str) -> bytes:
        path = self._path(name)
        try:
            with open_regular(path) as file:
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}; move it away") from error

    def _append(self, name: str, lines: str) -> None:
        if self.output_dir:
            self._waiting[name] += lines.encode()
            with self._warning(name), open(self._path(name), "ab", buffering=0) as file:
                while self._waiting[name]:  # the last write before a disk is full may be partial
                    self._waiting[name] = self._waiting[name][file.write(self._waiting[name]) :]

    def _add_metrics(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        self._add_scalars(step, {f"train/{key}": value for key, value in metrics.items() if key != "step"})

    def _add_scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        if self._events:
            with self._warning("events.out.tfevents*"):
                for name, value in scalars.items():
                    if value is not None:
                        self._events.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        """Turn any exception into a warning, once per file until it can be written again."""
        try:
            with write_errors(self._path(name)):
                yield
            self._refused.discard(name)
        except Exception as error:
            if name not in self._refused:
                reason = str(error)
                if not isinstance(error, BadInput):
                    reason = f"cannot write {self._path(name)}: {type(error).__name__}: {error}"
                print0(f"warning: {' '.join(reason.split())}; the run continues")
            self._refused.add(name)


class _Line(NamedTuple):
    """A line of a log."""

    kind: str
    """trl or tel, as llm.c calls training and validation losses; metrics or evals"""
    step: int
    loss: float = math.nan


def _parse_main(line: bytes) -> _Line | None:
    """A line of main.log; None where it is damaged."""
    match = re.fullmatch(rb"s:([0-9]{1,18}) (trl|tel):(-?[0-9]{1,40}\.[0-9]{6}|-?inf|nan)\n", line)
    return _Line(match[2].decode(), int(match[1]) + (match[2] == b"trl"), float(match[3])) if match else None


def _parse_metrics(line: bytes) -> _Line | None:
    """A line of metrics.jsonl; None where it is damaged."""
    if not line.endswith(b"\n") or len(line) > LONGEST_LINE:
        return None
    try:
        record = require(parse_json(line), {"step": integer()})
        return _Line("evals" if "evals" in record else "metrics", record["step"])
    except ValueError:
        return None


def step_line(metrics: dict[str, Any], num_iterations: int, seconds_per_step: float) -> str:
    """The line on the screen for an update. The time that is left follows from that of a step and what comes between
    steps, on average so far."""
    left = timedelta(seconds=round(seconds_per_step * (num_iterations - metrics["step"])))
    norm = "" if metrics["norm"] is None else f" | norm {metrics['norm']:.4f}"
    mfu = "" if metrics["mfu"] is None else f" | {100 * metrics['mfu']:.1f}% MFU"
    width = len(str(num_iterations))
    return (
        f"step {metrics['step']:>{width}}/{num_iterations} | train loss {metrics['loss']:.6f}{norm}"
        f" | lr {metrics['lr']:.2e} | {metrics['ms']:.1f} ms | {metrics['tok_per_s']:,.0f} tok/s{mfu} | {left} left"
    )


def _tensorboard_writer() -> type:
    """The class that writes TensorBoard events."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # such as incompatible versions of protobuf and NumPy
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(
            f"--tensorboard 1 needs tensorboard ({reason}): pip install -e '.[tensorboard]', or leave it out"
        ) from error
    return SummaryWriter


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory so far in MiB: torch's allocations on CUDA, the process's resident set elsewhere; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
