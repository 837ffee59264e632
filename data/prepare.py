"""From text to shards: `python -m data.prepare CORPUS`.

Documents come as a stream, each starts with end-of-text, and at most one shard of tokens is in memory. The first
tokens of the stream go to validation, as llm.c does it. The folder appears once it is complete.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from common import BadInput, exit_on_bad_input, lenient_streams, write_errors
from data.shards import write_shard
from data.tokenizer import END_OF_TEXT, gpt2_encoding

SHARDS = Path(__file__).parent / "shards"
SHARD_TOKENS = 100_000_000
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
TINYSHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

PYDOC_VAL_TOKENS = 20 * 1024 + 1  # what 20 validation batches of 8 × 128 read
TINYSHAKESPEARE_VAL_TOKENS = 32_768  # as in llm.c
TEXT_VAL_TOKENS = 32_768  # at most; a small corpus gives a tenth of itself

DOCUMENTS_A_TASK = 64
TASKS_A_WORKER = 4


def pydoc_documents() -> list[str]:
    """The topics of Python's language reference, which every CPython carries, in an order that mixes them.

    Validation takes the first tokens, so alphabetical order would validate on other words than it trains on.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(42).shuffle(names)
    return [topics[name] for name in names]


def text_documents(paths: list[str], field: str) -> Iterator[str]:
    """One document a text file, one a line of a .jsonl file; folders are searched; "-" is standard input.

    Args:
        paths: files, folders, or "-".
        field: name of the text in a line of .jsonl.

    Raises:
        BadInput: a path is not there or holds no text; a line is no JSON, or lacks the field.
    """
    for path in paths:
        if path == "-":
            yield _decode(sys.stdin.buffer.read(), "standard input")
            continue
        root = Path(path)
        if not os.path.exists(root):
            raise BadInput(f"{path}: no such file or folder; give paths of text, or - for standard input")
        files = [root]
        if root.is_dir():
            files = sorted(file for file in root.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
            if not files:
                raise BadInput(
                    f"{path}: no file below it ends in {', '.join(TEXT_SUFFIXES)}; name the files themselves"
                )
        for file in files:
            if file.suffix == ".jsonl":
                yield from _json_lines(file, field)
            else:
                yield _decode(_read(file), file)


def tinyshakespeare_documents() -> Iterator[str]:
    """The speeches of tiny Shakespeare, fetched from the network, cut at blank lines as llm.c does it.

    Raises:
        BadInput: it cannot be fetched.
    """
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE, timeout=30) as answer:
            text = _decode(answer.read(), TINYSHAKESPEARE)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise BadInput(
            f"tinyshakespeare cannot be fetched from {TINYSHAKESPEARE} ({getattr(error, 'reason', error)}); fetch it "
            "by other means and give it to: python -m data.prepare text FILE"
        ) from error
    speeches = text.split("\n\n")
    yield from (speech + "\n\n" for speech in speeches[:-1])
    yield speeches[-1]


def fineweb_documents(sample: str) -> Iterator[str]:
    """Web pages of FineWeb (Penedo et al. 2024, https://arxiv.org/abs/2406.17557), streamed from the network.

    Args:
        sample: "10B" or "100B", how many tokens it holds.

    Raises:
        BadInput: the library is not installed, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise BadInput("fineweb needs the library datasets: pip install -e '.[datasets]'") from error
    try:
        pages = datasets.load_dataset("HuggingFaceFW/fineweb", name=f"sample-{sample}T", split="train", streaming=True)
        for page in pages:
            yield page["text"]
    except Exception as error:  # whatever the HTTP client of the day raises, at the start or on the way
        raise BadInput(
            f"fineweb cannot be fetched from Hugging Face's hub ({str(error) or type(error).__name__}); check the "
            "network, or prepare text of your own with: python -m data.prepare text PATH"
        ) from error


def prepare(
    documents: Iterable[str],
    output_dir: Path,
    val_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
) -> dict[str, int]:
    """Tokenise documents into `val_*.bin` and `train_*.bin`.

    Args:
        documents: texts; each becomes end-of-text and its tokens.
        output_dir: a folder that is not there yet, or is empty. It appears once everything in it is complete.
        val_tokens: how many tokens, from the start of the stream, go to validation; None for a tenth of the corpus,
            at most 32,768.
        shard_tokens: tokens a shard; the last one of each kind holds the rest.
        workers: processes that tokenise; 1 does it here.

    Returns:
        Number of tokens of each kind: {"val": ..., "train": ...}.

    Raises:
        BadInput: the folder holds something, cannot be written, or the corpus leaves nothing to train on.
    """
    refuse_if_occupied(output_dir)
    output_dir = output_dir.resolve()
    part = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.part")
    new_parents = [parent for parent in output_dir.parents if not parent.exists()]
    try:
        with write_errors(output_dir):
            part.mkdir(parents=True)
        stream = _TokenStream(_tokenise(documents, workers))
        if val_tokens is None:
            val_tokens = min(TEXT_VAL_TOKENS, stream.hold(10 * TEXT_VAL_TOKENS) // 10)
        counts = {
            "val": _write_shards(stream, part, "val", shard_tokens, val_tokens),
            "train": _write_shards(stream, part, "train", shard_tokens, None),
        }
        if counts["train"] == 0:
            raise BadInput(
                f"the corpus has {counts['val']} tokens and --val_tokens takes {val_tokens} of them: none is left to "
                "train on; give more text or a smaller --val_tokens"
            )
        with write_errors(output_dir):
            os.rename(part, output_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # they stay where the folder is in them
            for parent in new_parents:
                parent.rmdir()
    return counts


def prepare_pydoc() -> Path:
    """The folder of the embedded corpus, prepared if this is the first time. Several processes may ask at once."""
    folder = SHARDS / f"pydoc-{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.exists():
        try:
            counts = prepare(pydoc_documents(), folder, PYDOC_VAL_TOKENS)
            print(
                f"tokenised Python's language reference into {folder}: {counts['train']:,} + {counts['val']:,} tokens"
            )
        except BadInput:
            if not folder.exists():  # otherwise another process was faster
                raise
    return folder


def refuse_if_occupied(output_dir: Path) -> None:
    """Raise BadInput unless `output_dir` is not there yet, or is an empty folder."""
    with write_errors(f"--output_dir {output_dir}"):  # it may not even be looked at
        if output_dir.is_dir():
            if any(output_dir.iterdir()):
                raise BadInput(
                    f"--output_dir {output_dir} is not empty; name a new folder, so that nothing is overwritten"
                )
        elif os.path.lexists(output_dir):
            raise BadInput(f"--output_dir {output_dir} is a file; name a folder")


class _TokenStream:
    """Tokens of documents, taken in pieces of any size."""

    def __init__(self, arrays: Iterator[np.ndarray]):
        self._arrays = arrays
        self._held: list[np.ndarray] = []
        self._n_held = 0

    def hold(self, n_tokens: int) -> int:
        """Read on until so many tokens are held or the stream ends; return how many are held."""
        while self._n_held < n_tokens:
            array = next(self._arrays, None)
            if array is None:
                break
            self._held.append(array)
            self._n_held += len(array)
        return self._n_held

    def take(self, n_tokens: int) -> np.ndarray:
        """The next n_tokens, or what is left of them."""
        self.hold(n_tokens)
        tokens = np.concatenate(self._held) if self._held else np.zeros(0, np.uint16)
        self._held, self._n_held = [tokens[n_tokens:]], max(0, len(tokens) - n_tokens)
        return tokens[:n_tokens]


def _write_shards(stream: _TokenStream, folder: Path, kind: str, shard_tokens: int, n_tokens: int | None) -> int:
    """Write up to n_tokens (None: all that are left) as shards of one kind; return how many there were."""
    done = 0
    for index in itertools.count():
        tokens = stream.take(shard_tokens if n_tokens is None else min(shard_tokens, n_tokens - done))
        if len(tokens) == 0:
            return done
        write_shard(folder / f"{kind}_{index:06d}.bin", tokens)
        done += len(tokens)


def _tokenise(documents: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """Tokens of the documents in order, with a progress bar on a terminal."""
    documents = iter(documents)
    tasks = iter(lambda: list(itertools.islice(documents, DOCUMENTS_A_TASK)), [])
    with tqdm(unit=" tokens", unit_scale=True, disable=None, leave=False) as progress:
        if workers == 1:
            for tokens in map(_tokenise_task, tasks):
                progress.update(len(tokens))
                yield tokens
            return
        with multiprocessing.Pool(workers) as pool:
            # In rounds, because imap would read the whole corpus ahead of the workers.
            while task_round := list(itertools.islice(tasks, TASKS_A_WORKER * workers)):
                for tokens in pool.imap(_tokenise_task, task_round):
                    progress.update(len(tokens))
                    yield tokens


def _tokenise_task(texts: list[str]) -> np.ndarray:
    encoding = gpt2_encoding()
    ids: list[int] = []
    for text in texts:
        ids.append(END_OF_TEXT)
        ids.extend(encoding.encode_ordinary(text))  # a text that spells <|endoftext|> stays text
    return np.array(ids, np.uint16)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error


def _decode(content: bytes, source: Path | str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{source}: byte {error.start} is no UTF-8; convert it first, or leave it out") from error


def _json_lines(file: Path, field: str) -> Iterator[str]:
    try:
        lines = open(file, "rb")  # noqa: SIM115 (the with follows; opening is what may fail)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(
                    f"{file}, line {number}: malformed JSON ({error}); correct or remove the line"
                ) from error
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise BadInput(f"{file}, line {number}: no text in the field {field!r}; name it with --field")
            yield text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see python -m data.prepare --help")


def _count(text: str) -> int:
    """A whole number that a shard's header can hold, also as 1e8."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value.is_integer() and 1 <= value < 2**31):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 to {2**31 - 1}")
    return int(value)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module."""
    lenient_streams()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output_dir", type=Path, help="New folder for the shards (default: data/shards/CORPUS).")
    common.add_argument("--shard_tokens", type=_count, default=SHARD_TOKENS, help="Tokens a shard (default: 1e8).")
    common.add_argument("--val_tokens", type=_count, help="Tokens of validation, from the start of the corpus.")
    common.add_argument("--workers", type=_count, default=os.cpu_count(), help="Processes (default: all cores).")
    parser = _Parser(prog="data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    corpora.add_parser("pydoc", parents=[common], help="Python's language reference; needs no network.")
    text = corpora.add_parser("text", parents=[common], help="Files, folders, or - for standard input.")
    text.add_argument("paths", nargs="+", metavar="PATH", help="Text, .jsonl, a folder of them, or -.")
    text.add_argument("--field", default="text", help="Field of a .jsonl line that holds the text (default: text).")
    corpora.add_parser("tinyshakespeare", parents=[common], help="Tiny Shakespeare, from the network.")
    fineweb = corpora.add_parser(
        "fineweb", parents=[common], help="FineWeb, from the network; needs the datasets extra."
    )
    fineweb.add_argument("--sample", choices=("10B", "100B"), default="10B", help="Size in tokens (default: 10B).")

    with exit_on_bad_input("data.prepare"):
        args = parser.parse_args(argv)
        output_dir = args.output_dir or SHARDS / args.corpus
        if args.corpus == "pydoc":
            documents, val_tokens = pydoc_documents(), PYDOC_VAL_TOKENS
        elif args.corpus == "text":
            documents, val_tokens = text_documents(args.paths, args.field), None
        elif args.corpus == "tinyshakespeare":
            documents, val_tokens = tinyshakespeare_documents(), TINYSHAKESPEARE_VAL_TOKENS
        else:
            documents, val_tokens = fineweb_documents(args.sample), args.shard_tokens
        counts = prepare(documents, output_dir, args.val_tokens or val_tokens, args.shard_tokens, args.workers)
        print(f"{output_dir}: {counts['train']:,} tokens to train on, {counts['val']:,} to validate with")
        val = f" --input_val_bin '{output_dir}/val_*.bin'" if counts["val"] else ""
        print(f"train on them: python train.py --input_bin '{output_dir}/train_*.bin'{val}")


if __name__ == "__main__":
    main()
