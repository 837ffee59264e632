"""Runs of the tiny network on gloo ranks."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import llmc
from tests.conftest import Run, command_line
from tests.training import ranks
from training import checkpoint, distributed, optim
from training.log import RunLog


@pytest.fixture
def start_ranks(tiny, tmp_path):
    """Start train.py on the tiny network on so many ranks; 0 is one process that knows nothing of ranks.

    With a number of restarts, the one process is torchrun's agent; see ranks.start. Returns what was started, and the
    run that it leaves.
    """
    numbers = itertools.count()
    started = []

    def start(n_ranks: int, before=None, options=(), restarts=None, **flags) -> tuple[ranks.Ranks, Run]:
        number = next(numbers)
        given = {"output_dir": tmp_path / f"run{number}", "timeout_s": 30} | flags
        arguments = command_line(tiny | {f"--{name}": value for name, value in given.items()})
        processes = ranks.start(n_ranks, arguments, tmp_path / f"screen{number}", before, options, restarts)
        started.append(processes)
        return processes, Run(Path(given["output_dir"]), "")

    yield start
    for processes in started:
        processes.kill()


@pytest.fixture
def run_ranks(start_ranks):
    """The same, and wait for it to end well."""

    def run(*what, **flags) -> Run:
        processes, run = start_ranks(*what, **flags)
        assert set(processes.wait()) == {0}, processes.errors
        run.screen = processes.screen
        return run

    return run


def after_each_step(then: Callable[[int], object]) -> None:
    """Call a function with the number of each step, once it is in the logs. For a process of its own."""
    train = RunLog.train

    def train_then(self, metrics):
        train(self, metrics)
        then(metrics["step"])

    RunLog.train = train_then


def before_each_save(then: Callable[[int], object]) -> None:
    """Call a function with the number of each step whose checkpoint is about to be written, in the background."""
    write = checkpoint._Writer.write_data

    def then_write(self, plan, planner):
        then(checkpoint.step_of(self.folder))
        return write(self, plan, planner)

    checkpoint._Writer.write_data = then_write


def keep_gradients(rank: int, folder) -> None:
    """Make train.py write the gradients of each step, as the clip leaves them and whole, to `folder`."""
    clip, steps = optim.clip_gradients, []

    def clip_and_keep(params, max_norm):
        params = list(params)
        norm = clip(params, max_norm)
        steps.append([distributed.full(p.grad).detach().clone() for p in params])
        torch.save(steps, folder / f"gradients_{rank}.pt")
        return norm

    optim.clip_gradients = clip_and_keep


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """The weights that a run ended with."""
    return dict(llmc.load_model(run.output_dir).named_parameters())


def same_weights(a: Run, b: Run) -> bool:
    """Whether two runs ended with the same bits."""
    ours, theirs = weights_of(a), weights_of(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def make_sums_fit(checkpoint: Path) -> None:
    """What somebody does who changes a checkpoint on purpose."""
    names = [".metadata", "state.json", *(path.name for path in checkpoint.glob("*.distcp"))]
    sums = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def everything_in(folder: Path) -> dict[str, bytes]:
    """The files in a folder and below, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_weights_agree(ours: Run, theirs: Run, rel: float) -> None:
    """All weights as one vector, and each tensor by its largest element, are the same but for `rel`.

    In the second, the biases of the keys do not count: a softmax does not see what is added to all keys alike
    (test_distributed.py has the proof), so that their gradient is rounding noise, which AdamW scales up.
    """
    ours_by_name, theirs_by_name = weights_of(ours), weights_of(theirs)
    assert ours_by_name.keys() == theirs_by_name.keys()
    all_ours, all_theirs = (torch.cat([w.flatten() for w in w_of.values()]) for w_of in (ours_by_name, theirs_by_name))
    off = (all_ours - all_theirs).norm() / all_theirs.norm()
    assert off < rel, f"all weights together are off by {off:.1e}"
    for name, weight in theirs_by_name.items():
        assert_close(without_keys(name, ours_by_name[name]), without_keys(name, weight), rel, name)


def without_keys(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the biases of the keys, if those are in it."""
    q, _, v = tensor.tensor_split(3)
    return torch.cat([q, v]) if name.endswith("c_attn.bias") else tensor


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, rel: float, what: str) -> None:
    """No element is off by more than `rel` of the largest."""
    off = (ours - theirs).abs().max() / theirs.abs().max()
    assert off < rel, f"{what} is off by {off:.1e}"
