"""--cuda_graph without a GPU: a stand-in records the operations of a capture, takes them back, and repeats them."""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import BadInput
from data.loader import ShardLoader
from kernels import launch
from kernels.ops import EAGER, Ops
from model import cuda_graph
from model.gpt import GPT, GPTConfig
from tests.budgets import capture
from tests.conftest import TRITON
from training import graph, optim
from training.checkpoint import TrainState
from training.config import Config
from training.distributed import World
from training.faults import UpdateGuard
from training.graph import GraphedUpdate
from training.step import Update

ALONE = World(0, 0, 1, torch.device("cpu"), distributed=False)
SMALL = GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=1, n_embd=16)
AdamW = torch.optim.AdamW

WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh"}
"""operations of torch that bring a result to the host, or a number from it, as torch.tensor does: no graph has them"""


class Recording(TorchDispatchMode):
    """Everything that is done in this block, to be repeated on the same memory. At its end, nothing has happened yet:
    what was there before is as it was, and what was made is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[torch.Tensor]]] = []
        self.made: dict[int, torch.UntypedStorage] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func._schema.name.removeprefix("aten::") not in WAITING, f"{func} waits for the device"
        given = {argument.name: argument for argument in func._schema.arguments}
        for name, value in (*zip(given, args, strict=False), *kwargs.items()):
            if given[name].alias_info and given[name].alias_info.is_write:
                self._keep(tensors_of(value))
        known = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        out = func(*args, **kwargs)
        new = [t.detach() for t in tensors_of(out) if t.untyped_storage()._cdata not in known]
        self.made |= {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in new}
        self.calls.append((func, args, kwargs, new))
        return out

    def _keep(self, written: list[torch.Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in written):
            if storage._cdata not in self.made and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)
        for storage in self.made.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, old in self.calls:
            made = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
            new = [t for t in tensors_of(func(*args, **kwargs)) if t.untyped_storage()._cdata not in made]
            for ours, theirs in zip(old, new, strict=True):
                ours.untyped_storage().copy_(theirs.untyped_storage())


def tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class StandIn:
    """CudaGraphs without a GPU."""

    def __init__(self, device: torch.device = ALONE.device) -> None:
        self.runs = 0
        self.recordings: list[Recording] = []

    def run(self, call):
        self.runs += 1
        return call()

    def capture(self, call):
        recording = Recording()
        self.recordings.append(recording)
        with recording:
            result = call()
        return result, recording.replay


def state_of(gpt: GPT) -> TrainState:
    """With AdamW as on a GPU: what it does without being fused, the host decides step by step."""
    optimizer = AdamW(optim.parameter_groups(gpt, 0.1), lr=1.0, betas=optim.BETAS, eps=optim.EPS, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(
        gpt, dict(gpt.named_parameters()), optimizer, scaler, cast(ShardLoader, None), UpdateGuard(), ALONE.device
    )


def steps_of(update: Update, n_steps: int, skipped: set[int]) -> list[dict[str, torch.Tensor]]:
    """Loss, norm, weights and moments after each of some updates, of other batches and at another rate each."""
    config, state, generator = update.config, update.state, torch.Generator().manual_seed(3)
    shape = config.batch_size, config.sequence_length + 1
    after = []
    for step in range(n_steps):
        tokens = [torch.randint(SMALL.vocab_size, shape, generator=generator) for _ in range(update.grad_accum_steps)]
        loss, norm = update.gradients(iter([(t[:, :-1], t[:, 1:]) for t in tokens] + [None]))
        numbers = {"loss": loss.clone(), "norm": norm.clone()}
        update.apply(optim.learning_rate(step, config), accepted=step not in skipped)
        tensors = state.tensors()
        after.append(numbers | {n: t.clone() for part in ("model", "optimizer") for n, t in tensors[part].items()})
    return after


def assert_same_bits(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        assert [name for name in other if not torch.equal(mine[name], other[name])] == [], f"step {step}"


CONFIG = Config(
    batch_size=2,
    sequence_length=7,
    total_batch_size=28,
    num_iterations=9,
    learning_rate=3e-3,
    warmup_iters=2,
    learning_rate_decay_frac=0.1,
    grad_clip=0.7,
    dtype="float32",
    cuda_graph=1,
)


def compare(ops: Ops, config: Config, n_steps: int, skipped: set[int], recompute: int = 0) -> None:
    """Updates with and without graphs, from the same weights on the same batches."""
    graphs, after = StandIn(), []
    for make in (Update, functools.partial(GraphedUpdate, graphs=graphs)):
        gpt = GPT(SMALL, ops)
        gpt.set_recompute(recompute)
        after.append(steps_of(make(config, ALONE, state_of(gpt), gpt), n_steps, skipped))
    want, got = after
    assert_same_bits(got, want)
    assert graphs.runs == 2 * cuda_graph.WARM_UP and len(graphs.recordings) == 2
    assert all(step["norm"] > config.grad_clip for step in want)  # the clip has something to do
    for step in skipped:
        before, then = ({n: got[i][n] for n in got[i] if n not in ("loss", "norm")} for i in (step - 1, step))
        assert_same_bits([then], [before])


@pytest.mark.parametrize(("dtype", "recompute"), [("float32", 0), ("bfloat16", 2)])
def test_replays_are_the_steps_of_a_run_without_graphs(dtype, recompute):
    """Batches, learning rate and clip are other ones at every step; the host skips updates in the warm-up, between the
    captures of both parts, and later."""
    compare(EAGER, dataclasses.replace(CONFIG, dtype=dtype), n_steps=9, skipped={1, 4, 7}, recompute=recompute)


def test_replays_of_the_kernels(monkeypatch):
    monkeypatch.setattr(cuda_graph, "WARM_UP", 1)
    compare(TRITON, dataclasses.replace(CONFIG, batch_size=1, total_batch_size=7), n_steps=3, skipped=set())


class Traced(StandIn):
    """What the captures launch, on fake tensors."""

    def __init__(self, tracing: capture.Trace) -> None:
        super().__init__()
        self.tracing, self.launched = tracing, []

    def capture(self, call):
        self.tracing.restart()
        result = call()
        self.launched.append([event.name for event in self.tracing.events])
        return result, lambda: None


@pytest.mark.parametrize("ops", [EAGER, TRITON], ids=["eager", "triton"])
def test_nothing_in_a_capture_waits_for_a_gpu(ops):
    """As on an H100, on fake tensors: they have no values, and raise where the host asks for one."""
    gpt = GPT(SMALL, ops, init=False)
    with capture.trace() as tracing:
        capture.fake_parameters(gpt)
        graphs = Traced(tracing)
        update = GraphedUpdate(CONFIG, ALONE, state_of(gpt), gpt, graphs)
        for _ in range(cuda_graph.WARM_UP + 1):
            update.gradients(update.inputs)
            update.apply(1e-3, accepted=True)
    gradients, step = graphs.launched
    assert step == ["aten::_foreach_add_", "aten::_fused_adamw_"] * 2  # of two groups
    assert ("_attention_fwd_kernel" in gradients) == (ops is TRITON) and gradients[-1] == "aten::_foreach_mul_"


def test_a_kernel_is_launched_on_the_stream_that_is_current_then(monkeypatch):
    """And not on that of its first launch: a capture has a stream of its own."""
    streams, launched = iter([5, 6]), []
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: next(streams)))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    compiled = SimpleNamespace(function=1, packed_metadata=2, run=lambda *args: launched.append(args[3]))
    launch_again = launch._launcher(compiled, (1,), 0, [])
    launch_again([0], [])
    launch_again([0], [])
    assert launched == [5, 6]


@pytest.fixture
def _stand_in_for_a_gpu(monkeypatch):
    """train.py with graphs, on a CPU, where AdamW is fused as on a GPU."""
    monkeypatch.setattr(cuda_graph, "WARM_UP", 1)
    monkeypatch.setattr(graph, "require_one_gpu", lambda config, world: None)
    monkeypatch.setattr(graph, "CudaGraphs", StandIn)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: AdamW(groups, **options | {"fused": True}))


@pytest.mark.usefixtures("_stand_in_for_a_gpu")
def test_a_run_with_graphs_leaves_the_files_of_one_without(run_tiny):
    """With validation and checkpoints in between; and each resumes from the other's checkpoint."""
    flags = {"num_iterations": 5, "checkpoint_every": 2, "keep": 9, "warmup_iters": 3}
    plain, graphed = (run_tiny(cuda_graph=on, val_loss_every=4, **flags) for on in (0, 1))
    assert graphed.log == plain.log and graphed.losses == plain.losses
    assert [line["norm"] for line in graphed.metrics] == [line["norm"] for line in plain.metrics]
    weights = (plain.output_dir / "model.bin").read_bytes()
    assert (graphed.output_dir / "model.bin").read_bytes() == weights
    for on, other in ((1, plain), (0, graphed)):
        resumed = run_tiny(cuda_graph=on, resume=other.output_dir / "checkpoints" / "step_2", **flags)
        assert resumed.losses == plain.losses[2:]
        assert (resumed.output_dir / "model.bin").read_bytes() == weights


@pytest.mark.parametrize(
    ("world", "told"),
    [(ALONE, "--cuda_graph 1 needs an NVIDIA GPU, and this run is on cpu"),
     (World(0, 0, 1, torch.device("cuda"), distributed=True), "--cuda_graph 1 is for a single process")],
)  # fmt: skip
def test_refused_where_it_cannot_hold(world, told):
    with pytest.raises(BadInput, match=f"^{told}.* give --cuda_graph 0$"):
        graph.require_one_gpu(CONFIG, world)
    graph.require_one_gpu(dataclasses.replace(CONFIG, cuda_graph=0), world)
