"""Hooks on the modules of the network: they run as in a plain GPT-2, and what they change is counted in the gradients,
whatever is fused or recomputed."""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.modules import module as of_all

from kernels.ops import EAGER, Ops
from model.gpt import GPT, GPTConfig
from tests.conftest import DEVICE, TRITON
from tests.model.plain import PlainGPT2
from training import distributed

CONFIG = GPTConfig(block_size=6, vocab_size=13, n_layer=2, n_head=2, n_embd=8)
KINDS = ("forward_pre", "forward", "full_backward", "full_backward_pre")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # ids have no gradient


def network(backend: Ops, level: int) -> GPT:
    """No bias is zero and no gain one."""
    gpt = GPT(CONFIG, backend, init=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in gpt.parameters():
            param.normal_(0.0, 0.3, generator=generator)
    gpt.set_recompute(level)
    return gpt.to(DEVICE)


def plain() -> PlainGPT2:
    return PlainGPT2(network(EAGER, 0).state_dict(), CONFIG).to(DEVICE)


NAMES = [name for name, module in plain().named_modules() if not isinstance(module, nn.ModuleDict | nn.ModuleList)]


def shapes(value) -> tuple | str | None:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return tuple(map(shapes, value)) if isinstance(value, tuple) else repr(value)


def scaled(value, factor: float):
    if isinstance(value, tuple):
        return tuple(scaled(item, factor) for item in value)
    return value * factor if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Watch:
    """Hooks that count what they see, and scale what they may."""

    def __init__(self) -> None:
        self.seen: Counter = Counter()
        self.names: dict[nn.Module, str] = {}

    def note(self, kind: str, module: nn.Module, *values) -> None:
        self.seen[self.names.get(module), kind, *map(shapes, values)] += 1

    def forward_pre(self, module, args):
        self.note("pre", module, args)
        return scaled(args, 1.25)

    def forward(self, module, args, *rest):
        *kwargs, output = rest  # kwargs where they were asked for
        self.note("forward", module, args, *map(str, kwargs), output)
        return scaled(output, 0.75)

    def full_backward(self, module, grad_input, grad_output):
        self.note("backward", module, grad_input, grad_output)
        return scaled(grad_input, 1.5)

    def full_backward_pre(self, module, grad_output):
        self.note("backward pre", module, grad_output)
        return scaled(grad_output, 0.5)

    @contextlib.contextmanager
    def on(self, model: nn.Module, names: list[str], kinds: tuple[str, ...]) -> Iterator[None]:
        self.names = {module: name for name, module in model.named_modules()}
        with contextlib.ExitStack() as stack:
            for name, kind in itertools.product(names, kinds):
                register = getattr(model.get_submodule(name), f"register_{kind}_hook")
                handle = register(getattr(self, kind), **({"with_kwargs": True} if kind == "forward" else {}))
                stack.callback(handle.remove)
            yield


def results(model: nn.Module, **kwargs) -> dict[str, torch.Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (2, 6), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    model.zero_grad()
    _, loss = model(tokens[:, :-1], tokens[:, 1:], **kwargs)
    loss.backward()
    return {"loss": loss.detach()} | {name: distributed.full(p.grad) for name, p in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-4, atol=1e-5, msg=functools.partial("{}, {}: {}".format, what, name)
        )


def watched(model: nn.Module, names: list[str], kinds: tuple[str, ...], **kwargs) -> tuple[dict, Counter]:
    watch = Watch()
    with watch.on(model, names, kinds):
        return results(model, **kwargs), watch.seen


def assert_as_plain(networks: list[GPT], names: list[str], kinds: tuple[str, ...], return_logits: bool = False) -> None:
    want, expected = watched(plain(), names, kinds, return_logits=return_logits)
    assert {name for name, *_ in expected} == set(names)
    for number, gpt in enumerate(networks):
        got, seen = watched(gpt, names, kinds, return_logits=return_logits)
        assert_same(got, want, f"{kinds} on {names}, network {number}")
        assert seen == expected, f"{kinds} on {names}, network {number}"


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_hook_on_one_module(kind):
    networks = [network(EAGER, level) for level in (0, 1, 2)]
    for name in ("transformer.h.0", "transformer.h.0.ln_1", *(name for name in NAMES if ".h.0" not in name)):
        assert_as_plain(networks, [name], (kind,))


@pytest.mark.parametrize("return_logits", [True, False])
def test_all_kinds_of_hooks_on_all_modules(return_logits):
    assert_as_plain([network(EAGER, level) for level in (0, 1, 2)], NAMES, KINDS, return_logits)


def test_hooks_between_kernels():
    networks = [network(TRITON, level) for level in (0, 1, 2)]
    assert_as_plain(networks, NAMES, KINDS)
    for name in ("transformer.h.1.ln_1", "transformer.h.0.mlp.c_proj"):
        assert_as_plain(networks[2:], [name], ("forward_pre", "forward"))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_all_modules_there_are(kind):
    def run(model: nn.Module) -> tuple[dict, Counter]:
        watch = Watch()
        watch.names = {module: name for name, module in model.named_modules()}
        handle = getattr(of_all, f"register_module_{kind}_hook")(getattr(watch, kind))
        try:
            return results(model), watch.seen
        finally:
            handle.remove()

    want, expected = run(plain())
    assert {name for name, *_ in expected} == set(NAMES)
    for level in (0, 1, 2):
        got, seen = run(network(EAGER, level))
        assert_same(got, want, f"global {kind}, recompute {level}")
        assert seen == expected


def test_hooks_under_compile():
    """One graph all the same."""
    names = ["transformer.wte", "transformer.h.1.ln_1", "transformer.h.0.attn.c_attn", "transformer.h.0", "lm_head"]
    gpt, reference = network(EAGER, 2), plain()
    for model in (gpt, reference):
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 0.75)
    compiled: Any = torch.compile(gpt, fullgraph=True, backend="aot_eager")
    got = {name.removeprefix("_orig_mod."): value for name, value in results(compiled, return_logits=False).items()}
    assert_same(got, results(reference), "compiled")


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved_elements(model: nn.Module) -> int:
    """Elements of what goes along the batch and is saved for backward."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[:2] == (2, 5) or tensor.shape[:1] == (10,):
            storages[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results(model, return_logits=False)
    return sum(storages.values())


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_recompute_below_the_hooks_of_fsdp(one_rank, zero_stage):
    """They are on attn and mlp, and turn nothing off; other hooks beside them do."""
    by_itself = [saved_elements(network(EAGER, level)) for level in (0, 1, 2)]
    assert by_itself[0] > by_itself[1] > by_itself[2]
    for level in (0, 1, 2):
        gpt = network(EAGER, level)
        distributed.shard(gpt, zero_stage, "float32", compile=False)
        assert saved_elements(gpt) == by_itself[level]
        assert_same(results(gpt, return_logits=False), results(plain()), f"stage {zero_stage}, recompute {level}")
        assert gpt.lm_head.weight is gpt.transformer.wte.weight
        reference = plain()
        for model in (gpt, reference):
            for name in ("transformer.h.0.attn", "transformer.h.1.mlp"):
                model.get_submodule(name).register_forward_pre_hook(lambda _, args: (1.25 * args[0], *args[1:]))
        assert_same(results(gpt, return_logits=False), results(reference), f"stage {zero_stage}, recompute {level}")
