"""Generation: the cache changes nothing, sampling is what it says, and the command line, also at a terminal."""

import collections
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import pty
import select
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, gpt2_encoding
from kernels import accuracy
from kernels.ops import EAGER, SDPA, Ops
from model import decoder, generate
from model.decoder import Decoder, PackedLinear, keep_likeliest, pack_weights
from model.generate import Sampling, Text, Token
from model.gpt import GPT, GPTConfig
from model.llmc import write_model
from tests.conftest import DEVICE, ROOT, TRITON
from tests.kernels.conftest import assert_no_worse
from training import distributed

SMALL = GPTConfig(block_size=12, vocab_size=61, n_layer=2, n_head=2, n_embd=32)
BACKENDS = {"eager": EAGER, "sdpa": SDPA, "triton": TRITON}
backends = pytest.mark.parametrize("ops", BACKENDS.values(), ids=BACKENDS)
PROMPTS = [[3], [5, 1, 4, 1, 5, 9, 2, 6], [7, 7, 3], [8, 2, 8, 1, 8]]
GREEDY = Sampling(temperature=0)


def network(ops: Ops = EAGER, config: GPTConfig = SMALL) -> GPT:
    """No bias is zero and no gain one. Embeddings are so large that greedy ids vary with token and position."""
    gpt = GPT(config, ops, init=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in gpt.named_parameters():
            param.normal_(
                0.0, 1.0 if name.startswith(("transformer.wte", "transformer.wpe")) else 0.3, generator=generator
            )
            if param.dim() == 1 and name.endswith("weight"):
                param.add_(1)
    return gpt.to(DEVICE)


@torch.no_grad()
def without_cache(gpt: GPT, prompt: list[int], n: int) -> tuple[list[int], torch.Tensor]:
    """Greedy ids, and logits (n, V), by a whole forward pass for each token."""
    ids, logits = list(prompt), []
    for _ in range(n):
        logits.append(gpt(torch.tensor([ids[-gpt.config.block_size :]], device=DEVICE))[0][0, -1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


def with_cache(gpt: GPT, prompts: list[list[int]], n: int) -> list[list[int]]:
    steps = list(generate.generate(gpt, prompts, n, GREEDY, seeds=range(len(prompts))))
    return [[tokens[row].id for tokens in steps] for row in range(len(prompts))]


@backends
def test_greedy_ids_are_those_without_a_cache(ops):
    """Prompts of four lengths in one batch; the windows of three slide, at different steps."""
    n = 6 if ops is TRITON and DEVICE == "cpu" else 15  # the interpreter is slow
    gpt = network(ops, dataclasses.replace(SMALL, block_size=8 if n == 6 else 12))
    want = [without_cache(gpt, prompt, n)[0] for prompt in PROMPTS]
    assert with_cache(gpt, PROMPTS, n) == want
    assert len({tuple(ids) for ids in want}) == 4 and len({id for ids in want for id in ids}) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@backends
def test_logits_are_no_worse_than_without_a_cache(ops, dtype):
    """Teacher-forced by one sequence of ids, against float64, over a window that slides too."""
    truth_of, eager, gpt = network().double(), network().to(dtype), network(ops).to(dtype)
    prompt = PROMPTS[1]
    ids, truth = without_cache(truth_of, prompt, 7)
    cached = Decoder(gpt, torch.tensor([prompt], device=DEVICE), 7)
    logits = [cached.prefill(), *(cached.step(torch.tensor([i], device=DEVICE)) for i in ids[:-1])]
    assert cached.cache.dtype == dtype and cached.cache.shape == (2, 2, 1, 2, 12, 16)
    with torch.no_grad():
        plain = [
            eager(torch.tensor([(prompt + ids[:i])[-12:]], device=DEVICE))[0][0, -1].log_softmax(-1) for i in range(7)
        ]
    assert_no_worse(
        [
            accuracy.compare(f"logprobs {i}", x[0].log_softmax(-1), plain[i], truth[i].log_softmax(-1), inner=dtype)
            for i, x in enumerate(logits)
        ]
    )


def old_generate(gpt: GPT, idx: torch.Tensor, n: int, temperature: float, top_k: int | None) -> torch.Tensor:
    """How GPT.generate was written before there was a cache."""
    for _ in range(n):
        logits = gpt(idx[:, -gpt.config.block_size :])[0][:, -1].float() / temperature
        if top_k is not None:
            logits = logits.masked_fill(logits < torch.topk(logits, top_k).values[:, [-1]], float("-inf"))
        idx = torch.cat((idx, torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)), dim=1)
    return idx


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("T", [1, 5, 12, 15])
def test_draws_are_those_without_a_cache(T, top_k):
    gpt, idx = network(), torch.arange(3 * T, device=DEVICE).view(3, T) % 61
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        want = old_generate(gpt, idx, 14, 1.3, top_k)
        torch.manual_seed(7)
        assert torch.equal(gpt.generate(idx, 14, 1.3, top_k), want)
        assert torch.equal(gpt.generate(idx, 0), idx)


def count_calls(monkeypatch, gpt: GPT) -> list[tuple[int, ...]]:
    """The shapes of what the first attention reads, while the network runs: by its parts, or half a block at once."""
    shapes: list[tuple[int, ...]] = []
    c_attn = gpt.transformer.h[0].attn.c_attn
    plain, sublayer = c_attn.forward, Ops.attention_sublayer

    def half(ops, stream, norm, linear, *rest):
        if linear[0] is c_attn.weight:
            shapes.append(tuple(stream.residual.shape))
        return sublayer(ops, stream, norm, linear, *rest)

    monkeypatch.setattr(c_attn, "forward", lambda x, *rest: shapes.append(tuple(x.shape)) or plain(x, *rest))
    monkeypatch.setattr(Ops, "attention_sublayer", half)
    return shapes


def test_each_token_runs_once_and_a_prompt_once_for_all_its_samples(monkeypatch):
    gpt = network()
    shapes = count_calls(monkeypatch, gpt)
    list(generate.generate(gpt, [PROMPTS[1], PROMPTS[2]], 4, GREEDY, seeds=range(6)))
    assert shapes == [(2, 8, 32), (6, 32), (6, 32), (6, 32)]
    shapes.clear()
    list(generate.generate(gpt, [PROMPTS[1]], 8, GREEDY, seeds=[0]))  # 12 fit
    assert shapes == [(1, 8, 32), *[(1, 32)] * 4, *[(1, 12, 32)] * 3]


@pytest.mark.parametrize("top_k", [None, 5])
def test_samples_are_what_each_gives_alone(top_k):
    gpt, sampling = network(), Sampling(temperature=1.5, top_k=top_k, top_p=0.9, repetition_penalty=1.2)
    together = list(generate.generate(gpt, PROMPTS, 9, sampling, seeds=range(8)))
    for row in range(8):
        alone = generate.generate(gpt, [PROMPTS[row // 2]], 9, sampling, seeds=[row])
        assert [tokens[0].id for tokens in alone] == [tokens[row].id for tokens in together]
    assert len({tuple(tokens[row].id for tokens in together) for row in (0, 1)}) == 2


# Hooks


@contextlib.contextmanager
def one_rank():
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_every_stage_samples_the_same(zero_stage):
    plain, gpt = network(), network()
    idx = torch.tensor([PROMPTS[2]], device=DEVICE)
    with torch.random.fork_rng(devices=[]), one_rank():
        if zero_stage:
            distributed.shard(gpt, zero_stage, "float32", compile=False)
        assert gpt.can_cache() == (not zero_stage)
        torch.manual_seed(7)
        want = old_generate(plain, idx, 12, 1.0, 40).detach()
        torch.manual_seed(7)
        assert torch.equal(gpt.generate(idx, 12, top_k=40), want)


def test_a_hook_sees_whole_sequences_and_what_it_changes_counts():
    gpt, seen = network(), []
    gpt.transformer.h[1].register_forward_hook(lambda module, args, output: seen.append(output.shape) or 0.5 * output)
    got = with_cache(gpt, [PROMPTS[1], PROMPTS[2]], 2)
    assert seen == [(1, 3, 32), (1, 8, 32), (1, 4, 32), (1, 9, 32)]  # one prompt at a time, since lengths differ
    assert got == [without_cache(gpt, prompt, 2)[0] for prompt in (PROMPTS[1], PROMPTS[2])]


def test_a_part_that_was_replaced_is_called():
    class Quiet(nn.Module):
        def forward(self, x, recompute_from=None):
            return torch.zeros_like(x)

    for name in ("attn", "mlp"):
        gpt = network()
        setattr(gpt.transformer.h[0], name, Quiet())
        assert with_cache(gpt, PROMPTS[:2], 6) == [without_cache(gpt, prompt, 6)[0] for prompt in PROMPTS[:2]]


def test_under_autocast_the_cache_has_the_dtype_of_the_matmuls():
    gpt, idx = network(), torch.tensor([PROMPTS[1]], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        cached = Decoder(gpt, idx, 2)
        cached.prefill()
        logits = cached.step(idx[:, 0])
        plain = gpt(cached.ids[:, :9])[0][:, -1]
    assert cached.cache.dtype == torch.bfloat16
    torch.testing.assert_close(logits, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


# The CUDA graph


def test_what_a_graph_would_replay_reads_only_what_stays_in_place(monkeypatch):
    """A graph launches the same kernels on the same memory again. So does what stands for it here: all is run again
    from a closure of the captured step, whose result is copied to one tensor."""
    captured = []

    class StandIn:
        def __init__(self, device):
            pass

        def run(self, call):
            return call()

        def capture(self, call):
            result = call()
            captured.append(result)
            return result, lambda: result.copy_(call())

    monkeypatch.setattr(decoder, "CudaGraphs", StandIn)
    gpt = network()
    steps = list(generate.generate(gpt, PROMPTS, 15, GREEDY, seeds=range(4), graph=True))
    got = [[tokens[row].id for tokens in steps] for row in range(4)]
    assert len(captured) == 1
    assert got == [without_cache(gpt, prompt, 15)[0] for prompt in PROMPTS]


@pytest.mark.gpu
@pytest.mark.parametrize("ops", [EAGER, TRITON], ids=["eager", "triton"])
def test_a_step_as_a_cuda_graph(ops):
    gpt = network(ops)
    plain = list(generate.generate(gpt, PROMPTS, 15, GREEDY, seeds=range(4)))
    graphed = list(generate.generate(gpt, PROMPTS, 15, GREEDY, seeds=range(4), graph=True))
    assert [[t.id for t in tokens] for tokens in graphed] == [[t.id for t in tokens] for tokens in plain]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_packed_weights_give_the_same_text(monkeypatch):
    gpt, packed = network(EAGER).cpu(), network(EAGER).cpu()
    pack_weights(packed)
    kinds = collections.Counter(map(type, packed.modules()))
    assert (kinds[PackedLinear], kinds[torch.nn.GELU]) == (4 * gpt.config.n_layer + 1, gpt.config.n_layer)
    assert torch.nn.Linear not in kinds
    idx = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(packed(idx)[0], gpt(idx)[0])
    assert with_cache(packed, PROMPTS, 9) == with_cache(gpt, PROMPTS, 9)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    pack_weights(gpt)
    pack_weights(network(EAGER).cpu().to(torch.bfloat16))
    assert not any(isinstance(module, PackedLinear) for module in gpt.modules())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_packed_weights_leave_a_gelu_kernel_in_use():
    n_calls = 0

    def gelu(x: torch.Tensor) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        return EAGER.gelu(x)

    gpt = network(EAGER._replace(gelu=gelu)).cpu()
    pack_weights(gpt)
    gpt(torch.tensor([PROMPTS[0]]))
    assert n_calls == gpt.config.n_layer


# Sampling


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
NOT_SEEN = torch.zeros_like(LOGITS, dtype=torch.bool)


def shares(sampling: Sampling, seen: torch.Tensor = NOT_SEEN, n: int = 20_000) -> torch.Tensor:
    """How often each id is chosen, over evenly spread draws."""
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids = sampling.choose(LOGITS.expand(n, -1), seen.expand(n, -1), draws)
    return torch.bincount(ids, minlength=5) / n


def test_ids_are_chosen_by_their_probabilities():
    torch.testing.assert_close(shares(Sampling(temperature=2.0)), F.softmax(LOGITS[0] / 2, -1), rtol=0, atol=1e-3)
    top_2 = F.softmax(torch.tensor([2.0, 3.0]), -1)
    torch.testing.assert_close(shares(Sampling(top_k=2))[[0, 4]], top_2, rtol=0, atol=1e-3)
    assert shares(Sampling(top_k=5)).count_nonzero() == 5
    # Of the probabilities 0.636, 0.234, 0.086, 0.032 and 0.012 the first two reach 0.8, and three 0.88.
    assert (shares(Sampling(top_p=0.8)) > 0).nonzero().flatten().tolist() == [0, 4]
    assert (shares(Sampling(top_p=0.88)) > 0).nonzero().flatten().tolist() == [0, 1, 4]
    assert shares(Sampling(top_p=1e-9))[4] == 1
    # Of the two likeliest, 0.731 and 0.269, the first reaches 0.7: top_p is of what top_k leaves.
    assert shares(Sampling(top_k=2, top_p=0.7))[4] == 1


def test_a_repeated_id_is_less_likely_whatever_its_sign():
    seen = torch.tensor([[False, False, False, True, True]])
    penalised = torch.tensor([2.0, 1.0, 0.0, -2.0, 1.5])
    got = shares(Sampling(repetition_penalty=2.0), seen)
    torch.testing.assert_close(got, F.softmax(penalised, -1), rtol=0, atol=1e-3)
    assert Sampling(temperature=0, repetition_penalty=2.0).choose(LOGITS, seen, torch.zeros(1)).item() == 0


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-48])
def test_the_outermost_draws_choose_ids_that_are_possible(draw):
    logits = torch.tensor([[float("-inf"), 1.0, 1.0, float("-inf")]]).expand(1, -1)
    got = Sampling().choose(
        logits, torch.zeros_like(logits, dtype=torch.bool), torch.tensor([draw], dtype=torch.float64)
    )
    assert got.item() == (1 if draw == 0 else 2)
    cold = Sampling(temperature=1e-300).choose(LOGITS * 1e4, NOT_SEEN, torch.tensor([draw], dtype=torch.float64))
    assert cold.item() == 4


def test_top_p_keeps_at_least_one_of_each_row():
    kept = keep_likeliest(torch.cat([LOGITS, -LOGITS]), top_p=1e-9).isfinite()
    assert kept.nonzero().tolist() == [[0, 4], [1, 3]]


def test_log_probabilities_are_the_models_own():
    """Whatever the sampling, of which the penalty changes the ids."""
    steps = list(generate.generate(network(), [PROMPTS[1]], 6, Sampling(0, repetition_penalty=3.0), seeds=[0]))
    ids, exact = list(PROMPTS[1]), network().double()
    for (token,) in steps:
        with torch.no_grad():
            logprobs = exact(torch.tensor([ids[-12:]], device=DEVICE))[0][0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(logprobs[token.id].item(), rel=1e-4, abs=1e-4)
        ids.append(token.id)
    assert ids[8:] != without_cache(network(), PROMPTS[1], 6)[0]


# Text


def texts(*pieces: bytes, stop: str = "") -> tuple[list[str], Text]:
    """What is given out after each token; the last one is the last."""
    of_bytes = {i: gpt2_encoding().decode_single_token_bytes(i) for i in range(256)}
    ids = [next(i for i, known in of_bytes.items() if known == piece) for piece in pieces]
    text = Text(stop)
    return [text.add(Token(i, 0.0), last=n == len(ids) - 1) for n, i in enumerate(ids)], text


def bytewise(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


def test_only_whole_characters_are_printed():
    assert texts(*bytewise("aé😀b"))[0] == ["a", "", "é", "", "", "", "😀", "b"]
    assert texts(b"a", b"\xf0")[0] == ["a", "�"]
    assert texts(b"\xf0", b"a", b"b")[0] == ["", "�a", "b"]


def test_a_stop_is_never_shown_and_ends_the_sample():
    given, text = texts(*bytewise("xababcab"), stop="abc")
    assert given == ["x", "", "", "ab", "", "", "", ""] and text.text == "xab"
    assert text.is_done and len(text.tokens) == 6
    given, text = texts(*bytewise("xab"), stop="abc")  # it does not come
    assert given == ["x", "", "ab"] and text.text == "xab"


def test_end_of_text_ends_it_and_is_not_shown():
    text = Text()
    assert [text.add(Token(i, 0.0), False) for i in (64, END_OF_TEXT, 64)] == ["a", "", ""]
    assert text.is_done and [token.id for token in text.tokens] == [64, END_OF_TEXT]


# The command


@pytest.fixture(scope="session")
def speaks_gpt2(tmp_path_factory) -> str:
    """The smallest network with GPT-2's vocabulary."""
    path = tmp_path_factory.mktemp("generate") / "gpt2_small.bin"
    write_model(path, GPT(GPTConfig(block_size=24, vocab_size=VOCAB_SIZE, n_layer=1, n_head=1, n_embd=8)))
    return str(path)


@pytest.fixture
def run(speaks_gpt2, capsys, monkeypatch):
    """Run the command on the CPU, or on another model; returns what it printed, and said on standard error."""

    def run(*words: str, model: str = speaks_gpt2, stdin: bytes = b"") -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status: int | str | None = 0
        try:
            generate.main([model, "--device", "cpu", *words])
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def test_a_line_of_json_per_sample(run):
    done = run("--prompt", "One two", "--tokens", "5", "--num_samples", "2", "--json")
    samples = [json.loads(line) for line in done.out.splitlines()]
    assert len(samples) == 2 and samples[0]["ids"] != samples[1]["ids"]
    for sample in samples:
        assert list(sample) == ["prompt", "text", "ids", "logprobs", "tok_per_s", "first_token_ms"]
        assert sample["prompt"] == "One two" and sample["text"] == gpt2_encoding().decode(sample["ids"])
        assert len(sample["ids"]) == len(sample["logprobs"]) == 5
        assert all(-13 < logprob < -9 for logprob in sample["logprobs"])  # nearly uniform: −ln 50257 is −10.8
        assert sample["tok_per_s"] > 0 and sample["first_token_ms"] > 0
    assert done.err.startswith("10 tokens in ") and "tok/s, the first after" in done.err
    again = run("--prompt", "One two", "--tokens", "5", "--seed", "43", "--json")
    assert json.loads(again.out)["ids"] == samples[1]["ids"]


def test_prompts_from_files_and_standard_input(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("One\n\nTwo three\n")
    flags = ("--tokens", "3", "--json", "--temperature", "0")
    of_file = [json.loads(line) for line in run("--prompt_file", str(path), *flags).out.splitlines()]
    assert [sample["prompt"] for sample in of_file] == ["One", "Two three"]
    of_stdin = run("--prompt_file", "-", *flags, stdin=path.read_bytes()).out
    assert [json.loads(line)["ids"] for line in of_stdin.splitlines()] == [sample["ids"] for sample in of_file]
    whole = json.loads(run("--prompt", "-", *flags, stdin=path.read_bytes()).out)
    assert whole["prompt"] == "One\n\nTwo three\n"
    assert (
        json.loads(run("--prompt", "", *flags).out)["ids"]
        == json.loads(run("--prompt", "<|endoftext|>", *flags).out)["ids"]
    )


def test_plain_text(run):
    """One sample streams after its prompt; several have a line between them. Each may be longer than the block."""
    sample = json.loads(run("--prompt", "One", "--tokens", "30", "--json").out)
    assert run("--prompt", "One", "--tokens", "30").out == f"One{sample['text']}\n"
    several = run("--prompt", "One", "--tokens", "30", "--num_samples", "2").out
    assert several.startswith(f"One{sample['text']}\n{'-' * 15}\nOne") and several.endswith(f"\n{'-' * 15}\n")
    cut = run("--prompt", "One", "--tokens", "30", "--stop", sample["text"][5:9]).out
    assert cut == f"One{sample['text'][:5]}\n"


def test_more_samples_than_are_made_together(run, monkeypatch):
    flags = ("--prompt_file", "-", "--tokens", "2", "--json", "--num_samples", "2")
    whole = run(*flags, stdin=b"a\nb\nc\n").out
    monkeypatch.setattr(generate, "MOST_ROWS", 4)
    parts = run(*flags, stdin=b"a\nb\nc\n").out
    ids = [[json.loads(line)["ids"] for line in out.splitlines()] for out in (whole, parts)]
    assert len(ids[0]) == 6 and ids[0] == ids[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_that_of_the_weights(run, dtype, monkeypatch):
    dtypes = []
    plain = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self: dtypes.append((x := plain(self)).dtype) or x)
    assert run("--prompt", "One", "--tokens", "2", "--dtype", dtype).status == 0
    assert dtypes == [getattr(torch, dtype)]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--temperature", "-1"], ["--temperature is -1.0", "0 for the likeliest"]),
        (["--temperature", "nan"], ["--temperature is nan"]),
        (["--top_k", "0"], ["--top_k is 0", "at least 1"]),
        (["--top_p", "0"], ["--top_p is 0.0", "above 0"]),
        (["--top_p", "1.5"], ["--top_p is 1.5", "at most 1"]),
        (["--top_p", "nan"], ["--top_p is nan"]),
        (["--repetition_penalty", "0"], ["--repetition_penalty is 0.0"]),
        (["--tokens", "0"], ["--tokens is 0", "from 1 to 1,000,000"]),
        (["--num_samples", "0"], ["--num_samples is 0"]),
        (["--seed", "-1"], ["--seed is -1"]),
        (["--tokens", "many"], ["--tokens", "many"]),
        (["--prompt", "a", "--prompt_file", "b"], ["--prompt_file", "not allowed with"]),
        (["--prompt", "word " * 25], ["--prompt has a prompt of 26 tokens", "24"]),
        (["--prompt_file", "not there"], ["--prompt_file not there", "name a text file"]),
        (["--prompt_file", "-"], ["standard input has no prompt"]),
        (["--num_samples", "2"], ["--num_samples needs a --prompt"]),
        (["--prompt", "a", "--device", "tpu"], ["--device tpu"]),
        (["--prompt", "a", "--backend", "nobody"], ["--backend nobody", "eager"]),
        (["--prompt", "a", "--dtype", "float64"], ["--dtype"]),
    ],
    ids=lambda value: " ".join(value[:2])[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, flags, told):
    done = run(*(flags if "--num_samples" in flags or "--prompt" in " ".join(flags) else ["--prompt", "a", *flags]))
    assert done.status == 2 and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("model.generate: ")
    for word in told:
        assert word in line, line


def test_a_cpu_takes_torchs_attention_unless_told_otherwise(speaks_gpt2):
    for words, want in (([], SDPA), (["--backend", "eager"], EAGER)):
        assert generate.open_model(generate.parse([speaks_gpt2, "--device", "cpu", *words])).ops == want


def test_bad_files_are_one_line(run, tiny, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\n")
    latin.write_bytes(b"caf\xe9")
    for words, model, told in (
        (["--prompt_file", str(empty)], {}, f"--prompt_file {empty} has no prompt"),
        (["--prompt_file", str(latin)], {}, f"--prompt_file {latin}: 'utf-8'"),
        (["--prompt", "a"], {"model": tiny["--model"]}, "has a vocabulary of 61, and text is written in GPT-2's"),
        (
            ["--prompt", "a"],
            {"model": str(tmp_path / "none.bin")},
            f"model.generate: {tmp_path / 'none.bin'}: cannot be",
        ),
        (["--prompt", "a"], {"model": "nowhere"}, "model.generate: nowhere is neither a path nor a name"),
        (["--prompt", "a"], {"model": str(tmp_path)}, f"model.generate: {tmp_path}: cannot load this folder"),
    ):
        done = run(*words, **model)
        assert done.status == 2 and told in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize(
    ("number", "status", "told"), [(errno.ENOSPC, 2, "cannot write standard output: No space"), (errno.EPIPE, 0, "")]
)
def test_a_full_disk_is_told_and_a_reader_that_is_gone_is_not(run, monkeypatch, number, status, told):
    class Refusing(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Refusing())
    done = run("--prompt", "a", "--tokens", "2")
    assert done.status == status and told in done.err and done.err.count("\n") == bool(told)


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *command: str):
        self.process, self.fd = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.execv(command[0], command)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Read until `text` appears; returns all up to it, which is not looked at again."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.fd], [], [], deadline - time.monotonic())[0], f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            except OSError as error:  # Linux says so at the end
                assert error.errno == errno.EIO and text == "", self.seen
                break
        before, _, self.seen = self.seen.partition(text) if text else (self.seen, "", "")
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, and then Enter for another prompt: the terminal drops what is on its way out, perhaps one."""
        self.type("\x03")
        time.sleep(0.3)
        self.type("\r")
        self.wait_for("\r\n> ")

    def end(self) -> int:
        _, status = os.waitpid(self.process, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_a_session_at_a_terminal(speaks_gpt2):
    """A prompt streams, Ctrl-C ends the text and the line at hand but not the program, the arrow brings back the last
    prompt, and end of file ends it."""
    terminal = Terminal(sys.executable, "-m", "model.generate", speaks_gpt2, "--device", "cpu", "--tokens", "900000")
    try:
        terminal.wait_for("> ")
        terminal.type("Hello\r")
        terminal.wait_for("Hello\r\n")
        while len(terminal.seen) < 200:  # it streams
            terminal.seen += os.read(terminal.fd, 4096).decode(errors="replace")
        terminal.interrupt()
        terminal.type("half a line")
        terminal.interrupt()
        terminal.type("\x1b[A\r")  # the last prompt
        terminal.wait_for("Hello\r\n")
        terminal.wait_for(" ")
        terminal.interrupt()
        terminal.type(f"{'word ' * 25}\r")
        terminal.wait_for("this line has a prompt of 26 tokens")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    except BaseException:
        os.kill(terminal.process, signal.SIGKILL)
        raise


def test_control_characters_do_not_reach_a_terminal(capsys):
    writer = generate.Writer()
    writer.write("\x1b[2J")
    writer.is_terminal = True
    writer.write("\x1b[2Jé\n")
    assert capsys.readouterr().out == "\x1b[2J\\x1b[2Jé\n"


def test_the_clock(monkeypatch):
    times = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = generate.Clock()
    clock.count(2)
    clock.count(2)
    assert str(clock) == "4 tokens in 2.00 s, 2.0 tok/s, the first after 500 ms" and math.isclose(clock.tok_per_s, 2.0)
