"""Continue texts: `python -m model.generate MODEL --prompt TEXT`, or without a prompt for one at a time.

Text is shown as it comes, in whole characters: a token may end inside of one. A sample ends at end-of-text, at `--stop`
or after `--tokens`. Every sample draws from a generator of its own, so it does not depend on those beside it.
"""

import argparse
import codecs
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from common import BadInput, exit_on_bad_input, exit_on_signal, lenient_streams, print_error
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, gpt2_encoding
from kernels import ops
from model.decoder import Decoder, keep_likeliest, pack_weights
from model.gpt import GPT
from model.load import load
from readers import open_regular

DEVICES = ("cuda", "mps", "cpu")
MOST_TOKENS = 1_000_000
MOST_ROWS = 16
"""samples that are made together, unless one prompt has more"""
COLDEST = 1e-6
"""a temperature below takes the likeliest token too: logits divided by it could exceed fp32"""
DRAW_BITS = 48
"""of a uniform number: its product with a sum of probabilities in float64 stays below that sum"""


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 1.0
    """logits are divided by it; 0 takes the likeliest"""
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """divides positive logits of ids that the sequence has already, multiplies negative ones (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858)"""

    def choose(self, logits: torch.Tensor, seen: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Choose an id per row.

        Args:
            logits: (B, V), any dtype.
            seen: (B, V) bool, the ids that each sequence has.
            draws: (B,) float64, uniform in [0, 1).

        Returns:
            (B,) int64, below V.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            scaled = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, scaled, logits)
        if self.temperature < COLDEST:
            return logits.argmax(dim=-1)
        probs = torch.softmax(keep_likeliest(logits / self.temperature, self.top_k, self.top_p), dim=-1)
        sums = (probs.cpu() if probs.is_mps else probs).double().cumsum(dim=-1)  # mps has no float64
        ids = torch.searchsorted(sums, draws[:, None].to(sums.device) * sums[:, -1:], right=True)
        return ids[:, 0].to(logits.device)


class Token(NamedTuple):
    """The next token of a sample."""

    id: int
    logprob: float
    """natural logarithm of its probability by the model itself, whatever the sampling"""


@torch.no_grad()
def generate(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    graph: bool = False,
) -> Iterator[list[Token]]:
    """Continue prompts, all together.

    Args:
        gpt: the network, on the device and in the dtype in which it runs.
        prompts: ids, at least one each and at most block_size.
        n_tokens: for each sample.
        sampling: how ids are chosen.
        seeds: one per sample: for each prompt in turn, len(seeds)/len(prompts) of them.
        graph: as in `Decoder`.

    Yields:
        A token per sample, n_tokens times.
    """
    device = gpt.transformer.wte.weight.device
    lengths, copies = [len(prompt) for prompt in prompts], len(seeds) // len(prompts)
    padded = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], device=device)
    decoder = Decoder(gpt, padded, n_tokens, lengths, copies, graph)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    seen = torch.zeros(len(seeds), gpt.config.vocab_size, dtype=torch.bool, device=device)
    for row, length in enumerate(decoder.lengths):
        seen[row, decoder.ids[row, :length]] = True
    logits = decoder.prefill()
    for i in range(n_tokens):
        logits = logits[:, : gpt.config.vocab_size]
        draws = torch.cat([torch.randint(2**DRAW_BITS, (1,), generator=g) for g in generators]).double() / 2**DRAW_BITS
        ids = sampling.choose(logits, seen, draws)
        logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[:, None])[:, 0]
        yield [Token(*pair) for pair in zip(ids.tolist(), logprobs.tolist(), strict=True)]
        if i < n_tokens - 1:
            seen.scatter_(1, ids[:, None], True)
            logits = decoder.step(ids)


class Text:
    """The text of one sample, from tokens to whole characters."""

    def __init__(self, stop: str = ""):
        self.tokens: list[Token] = []
        self.text = ""
        """what was given out so far; never part of a character, of `stop` or of what follows it"""
        self.is_done = False
        self._stop = stop
        self._held = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, token: Token, last: bool) -> str:
        """Add a token, unless the sample is done; `last` if none will follow. Returns the text that is new."""
        if self.is_done:
            return ""
        self.tokens.append(token)
        self.is_done = last or token.id == END_OF_TEXT
        content = b"" if token.id == END_OF_TEXT else gpt2_encoding().decode_single_token_bytes(token.id)
        self._held += self._decode(content, self.is_done)
        new, found, _ = self._held.partition(self._stop) if self._stop else (self._held, "", "")
        self.is_done |= bool(found)
        if not self.is_done:  # the end may be the beginning of the stop
            n_held = next(n for n in range(len(self._stop), -1, -1) if n == 0 or new.endswith(self._stop[:n]))
            new = new[: len(new) - n_held]
        self._held = self._held[len(new) :]
        self.text += new
        return new


class Clock:
    """Tokens per second, and the time to the first."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.first_s = 0.0
        self.seconds = 0.0
        self._started = time.perf_counter()

    def count(self, n: int) -> None:
        """Note that n tokens have come."""
        self.seconds = time.perf_counter() - self._started
        self.first_s = self.first_s or self.seconds
        self.n_tokens += n

    @property
    def tok_per_s(self) -> float:
        return self.n_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        first = f"the first after {1e3 * self.first_s:,.0f} ms"
        return f"{self.n_tokens:,} tokens in {self.seconds:.2f} s, {self.tok_per_s:,.1f} tok/s, {first}"


class Writer:
    """Standard output. On a terminal, control characters are shown as escapes: a model could control it."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Write at once. A reader that is gone (`| head`) ends the program.

        Raises:
            BadInput: it cannot be written, for example because the disk is full.
        """
        if self.is_terminal:
            text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            raise SystemExit(0) from None
        except OSError as error:
            raise BadInput(f"cannot write standard output: {error.strerror or error}; free some space") from error


class Run(NamedTuple):
    """A network that is loaded, and what was asked of it."""

    gpt: GPT
    args: argparse.Namespace
    sampling: Sampling
    writer: Writer

    def encode(self, prompt: str, flag: str) -> list[int]:
        """Ids of a prompt; of an empty one, end-of-text.

        Raises:
            BadInput: they are more than block_size.
        """
        ids = gpt2_encoding().encode(prompt, allowed_special="all") or [END_OF_TEXT]
        block_size = self.gpt.config.block_size
        if len(ids) > block_size:
            raise BadInput(f"{flag} has a prompt of {len(ids):,} tokens, and the block is {block_size:,}; shorten it")
        return ids

    def continue_(self, prompts: Sequence[list[int]], first: int, clock: Clock, stream: bool = False) -> list[Text]:
        """Continue prompts together; their samples are numbered from `first` on. With `stream`, show the only one."""
        args = self.args
        texts = [Text(args.stop) for _ in range(len(prompts) * args.num_samples)]
        seeds = [args.seed + first + i for i in range(len(texts))]
        on_gpu = self.gpt.transformer.wte.weight.device.type == "cuda"
        steps = generate(self.gpt, prompts, args.tokens, self.sampling, seeds, graph=on_gpu)
        for i, tokens in enumerate(steps, 1):
            clock.count(sum(not text.is_done for text in texts))
            for text, token in zip(texts, tokens, strict=True):
                new = text.add(token, last=i == args.tokens)
                if stream:
                    self.writer.write(new)
            if all(text.is_done for text in texts):
                break
        return texts

    def batch(self, prompts: list[str], flag: str) -> None:
        """Continue prompts and show all samples."""
        encoded = [self.encode(prompt, flag) for prompt in prompts]
        n_samples, total = self.args.num_samples, Clock()
        n_together = max(1, MOST_ROWS // n_samples)
        alone = len(prompts) * n_samples == 1 and not self.args.json
        if alone:
            self.writer.write(prompts[0])
        for start in range(0, len(prompts), n_together):
            clock = Clock()
            texts = self.continue_(encoded[start : start + n_together], start * n_samples, clock, stream=alone)
            total.count(clock.n_tokens)
            total.first_s = clock.first_s if start == 0 else total.first_s
            for i, text in enumerate(texts):
                self._show(prompts[start + i // n_samples], text, clock, alone)
        print_error(str(total))

    def _show(self, prompt: str, text: Text, clock: Clock, alone: bool) -> None:
        if self.args.json:
            of_tokens = {"ids": [t.id for t in text.tokens], "logprobs": [t.logprob for t in text.tokens]}
            timing = {"tok_per_s": clock.tok_per_s, "first_token_ms": 1e3 * clock.first_s}
            self.writer.write(json.dumps({"prompt": prompt, "text": text.text} | of_tokens | timing) + "\n")
        else:
            self.writer.write("\n" if alone else f"{prompt}{text.text}\n{'-' * 15}\n")

    def interact(self) -> None:
        """Ask for prompts until end of file. Ctrl-C ends a text, or the line at hand."""
        with contextlib.suppress(ImportError):  # Windows
            import readline  # noqa: F401  (gives input() a history)
        for number in itertools.count():
            try:
                prompt = input("> ")
                if prompt:
                    clock = Clock()
                    self.continue_([self.encode(prompt, "this line")], number, clock, stream=True)
                    self.writer.write("\n")
                    print_error(str(clock))
            except KeyboardInterrupt:
                self.writer.write("\n")
            except BadInput as error:
                print_error(str(error))
            except EOFError:
                self.writer.write("\n")
                return


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see python -m model.generate --help")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        BadInput: an unknown flag or an impossible value.
    """
    parser = _Parser(
        prog="model.generate",
        allow_abbrev=False,
        description="Continue texts. Without a prompt, asks for one at a time: Ctrl-C ends a text, end of file all.",
        epilog="Prompt and text may be longer than the block of the model. Its window then slides over the last "
        "tokens, whose positions restart at 0: from there on each token costs a pass over the whole block.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="A run directory, a .bin file of llm.c, gpt2 or a folder of transformers."
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--prompt", metavar="TEXT", help="What to continue; - for standard input, as one text.")
    where.add_argument("--prompt_file", metavar="FILE", help="A prompt per line; - for standard input.")

    def add(name: str, default: Any, kind: type, text: str) -> None:
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=kind.__name__.upper(), help=text)

    add("tokens", 128, int, "Most tokens of a sample (default: 128).")
    add("num_samples", 1, int, "Samples of each prompt, which is run once for all of them (default: 1).")
    add("temperature", 1.0, float, "Below 1 likelier, above 1 wilder; 0 takes the likeliest token (default: 1).")
    add("top_k", None, int, "Choose among the k likeliest tokens (default: all).")
    add("top_p", 1.0, float, "Choose among the likeliest tokens that have this probability together (default: 1).")
    add("repetition_penalty", 1.0, float, "Above 1 makes tokens that were used before less likely (default: 1).")
    add("seed", 42, int, "The first sample draws from this seed, the next from the next (default: 42).")
    add("stop", "", str, "End a sample before this text.")
    add("device", "", str, "cuda, mps or cpu (default: the first of them that is there).")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"),
        help="Of weights, cache and matmuls (default: float32).")  # fmt: skip
    add("backend", "", str, "As in train.py (default: triton on a GPU, sdpa elsewhere, where it is faster than eager).")
    parser.add_argument("--json", action="store_true", help="A line of JSON per sample: prompt, text, ids, logprobs "
        "(natural, by the model itself), tok_per_s of the samples made together, first_token_ms.")  # fmt: skip
    args = parser.parse_args(argv)
    inf = float("inf")
    for name, least, most, told in (
        ("tokens", 1, MOST_TOKENS, f"from 1 to {MOST_TOKENS:,}"),
        ("num_samples", 1, 10_000, "from 1 to 10,000"),
        ("temperature", 0.0, 1e6, "0 for the likeliest token, or above, to 1,000,000"),
        ("top_k", 1, inf, "at least 1; leave it out for all tokens"),
        ("repetition_penalty", 1e-6, 1e6, "above 0; 1 changes nothing"),
        ("seed", 0, 2**62, "from 0 to 2^62"),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:  # NaN too
            raise BadInput(f"--{name} is {value}; it must be {told}")
    if args.num_samples > 1 and args.prompt is args.prompt_file is None:
        raise BadInput("--num_samples needs a --prompt or a --prompt_file; without, each line that you give has one")
    if not 0 < args.top_p <= 1:
        raise BadInput(f"--top_p is {args.top_p}; it must be above 0 and at most 1, which keeps all tokens")
    return args


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts of a command line; None to ask for them.

    Raises:
        BadInput: the file cannot be read, is not UTF-8, or has no prompt.
    """
    if args.prompt is None and args.prompt_file is None:
        return None
    if args.prompt not in (None, "-"):
        return [args.prompt]
    from_stdin = "-" in (args.prompt, args.prompt_file)
    name = "standard input" if from_stdin else f"--prompt_file {args.prompt_file}"
    try:
        if from_stdin:
            content = sys.stdin.buffer.read()
        else:
            with open_regular(Path(args.prompt_file), follow=True) as file:
                content = file.read()
        text = content.decode()
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror or error}; name a text file") from error
    except ValueError as error:  # also a name that no file can have
        raise BadInput(f"{name}: {error}; name a text file in UTF-8") from error
    prompts = [text] if args.prompt == "-" else [line for line in text.splitlines() if line.strip()]
    if not any(prompts):
        raise BadInput(f"{name} has no prompt; write one per line")
    return prompts


def open_model(args: argparse.Namespace) -> GPT:
    """Load the network that a command line names, onto its device and in its dtype.

    Raises:
        BadInput: device, backend or model cannot be used, or it has another vocabulary than GPT-2's.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = args.device or next(name for name in DEVICES if there[name])
    if not there.get(device.partition(":")[0]):
        raise BadInput(
            f"--device {device}: there is none here; choose from {', '.join(n for n in DEVICES if there[n])}"
        )
    kind = device.partition(":")[0]
    backend = args.backend or ops.default_backend(kind, elsewhere="sdpa")
    try:
        torch.empty(0, device=device)
        table = ops.parse(backend, kind)
    except (ImportError, ValueError) as error:
        raise BadInput(f"--backend {backend}: {error}") from error
    except RuntimeError as error:
        raise BadInput(f"--device {device}, --backend {backend}: {str(error).splitlines()[0]}") from error
    gpt = load(args.model, table)
    if gpt.config.vocab_size != VOCAB_SIZE:
        raise BadInput(
            f"{args.model} has a vocabulary of {gpt.config.vocab_size}, and text is written in GPT-2's, of "
            f"{VOCAB_SIZE}; name another model"
        )
    gpt = gpt.to(device, getattr(torch, args.dtype))
    if kind == "cpu":
        pack_weights(gpt)
    return gpt


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    lenient_streams()
    with exit_on_bad_input("model.generate"):
        with exit_on_signal("model.generate"):
            args = parse(argv)
            prompts = read_prompts(args)
            gpt = open_model(args)
            sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
            run = Run(gpt, args, sampling, Writer())
            if prompts is not None:
                run.batch(prompts, "--prompt" if args.prompt else f"--prompt_file {args.prompt_file}")
                return
        run.interact()


if __name__ == "__main__":
    main()
