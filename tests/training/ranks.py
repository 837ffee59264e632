"""Ranks of train.py on this machine's CPU, over gloo, without seconds of imports for each.

Every rank is a process of its own, forked from a server that has imported train.py once; it is started as `torchrun`
starts it, by environment variables, and can be killed like any other. Or torchrun's own agent is one, and forks ranks.
"""

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.run"])


@dataclass
class Ranks:
    """Processes that were started together. What each prints goes to files."""

    processes: list
    folder: Path

    def wait(self, timeout_s: float = 60) -> list[int]:
        """Wait for all, and give their exit statuses; negative where a signal ended them, as subprocess has it.

        Raises:
            TimeoutError: one is still running. All of them are killed.
        """
        end = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        if late:
            self.kill()
            raise TimeoutError(f"ranks {late} are still running after {timeout_s} s:\n{self.errors}")
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """kill -9 to all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    @property
    def screen(self) -> str:
        """What rank 0 printed."""
        return (self.folder / "out_0").read_text()

    @property
    def errors(self) -> str:
        """What all of them printed on standard error."""
        return "".join((self.folder / f"err_{rank}").read_text() for rank in range(len(self.processes)))


def start(
    ranks: int,
    arguments: list[str],
    folder: Path,
    before: Callable[..., None] | None = None,
    options: tuple = (),
    restarts: int | None = None,
    program: str = "train",
) -> Ranks:
    """Start ranks of train.py, or of another program.

    Args:
        ranks: how many; 0 for one process that knows nothing of ranks.
        arguments: of train.py.
        folder: where what they print goes.
        before: called in each of them first, with its rank and `options`; a function at the top of a module.
        options: for `before`.
        restarts: start torchrun's agent instead, a single process, which restarts its ranks at most this many times.
        program: the module with the `main`.
    """
    _start_server()
    folder.mkdir(parents=True, exist_ok=True)
    of_train = (program, arguments, before, options)
    if restarts is not None:
        return Ranks([_process(0, folder, _agent, (ranks, restarts, of_train))], folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everywhere = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [everywhere | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)] or [{}]
    return Ranks([_process(rank, folder, _rank, (place, *of_train)) for rank, place in enumerate(places)], folder)


def blank_figure(log: Any) -> SimpleNamespace:
    """For `RunLog._figure`. The true one takes a quarter of a second per run; test_log.py draws it."""
    return SimpleNamespace(savefig=lambda file, **options: file.write(b"no picture"))


def _start_server() -> None:
    """Start the server, if it is not running, in an environment in which kernels are interpreted.

    It imports torch._dynamo, and with it triton, before a rank can choose; this process may have compiled kernels.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _process(number: int, folder: Path, target: Callable, options: tuple) -> BaseProcess:
    for kind in ("out", "err"):
        (folder / f"{kind}_{number}").write_text("")
    process = _CONTEXT.Process(target=_printing_to_files, args=(number, folder, target, options))
    process.start()
    return process


def _printing_to_files(number: int, folder: Path, target: Callable, options: tuple) -> None:
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        with open(folder / f"{kind}_{number}", "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    target(*options)


def _rank(environment: dict, program: str, arguments: list[str], before: Callable | None, options: tuple) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    main = importlib.import_module(program).main
    importlib.import_module("training.log").RunLog._figure = blank_figure
    if before:
        before(int(os.environ.get("RANK", 0)), *options)
    sys.exit(main(arguments))


def _agent(ranks: int, restarts: int, of_train: tuple) -> None:
    """What `torchrun --standalone` does, but that ranks are forked."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    flags = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
    flags += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    config, *_ = run.config_from_args(run.parse_args([*flags, "train.py"]))
    config.start_method = "fork"
    elastic_launch(config, _rank)({}, *of_train)
