"""Ranks of train.py on this machine's CPU, over gloo, without seconds of imports for each.

Every rank is a process of its own, forked from a server that has imported train.py once; it is started as `torchrun`
starts it, by environment variables, and can be killed like any other.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.figure"])


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

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one."""
        os.kill(self.processes[rank].pid, number)

    @property
    def screen(self) -> str:
        """What rank 0 printed."""
        return (self.folder / "out_0").read_text()

    @property
    def errors(self) -> str:
        """What all of them printed on standard error."""
        return "".join((self.folder / f"err_{rank}").read_text() for rank in range(len(self.processes)))


def start(
    ranks: int, arguments: list[str], folder: Path, before: Callable[..., None] | None = None, options: tuple = ()
) -> Ranks:
    """Start ranks of train.py.

    Args:
        ranks: how many; 0 for one process that knows nothing of ranks.
        arguments: of train.py.
        folder: where what they print goes.
        before: called in each of them first, with its rank and `options`; a function at the top of a module.
        options: for `before`.
    """
    _start_server()
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(max(1, ranks)):
        for kind in ("out", "err"):
            (folder / f"{kind}_{rank}").write_text("")
        process = _CONTEXT.Process(target=_rank, args=(rank, ranks, port, arguments, folder, before, options))
        process.start()
        processes.append(process)
    return Ranks(processes, folder)


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


def _rank(
    rank: int, ranks: int, port: int, arguments: list[str], folder: Path, before: Callable | None, options: tuple
) -> None:
    if ranks:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        with open(folder / f"{kind}_{rank}", "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    import train

    if before:
        before(rank, *options)
    sys.exit(train.main(arguments))
