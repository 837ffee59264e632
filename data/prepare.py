"""From text to shards: `python -m data.prepare CORPUS`.

Documents are streamed, each starts with end-of-text, and at most one shard of tokens is in memory. The first tokens go
to validation, as in llm.c. The folder appears once it is complete. FineWeb takes hours, so its finished shards are kept
after a failure, and the same command resumes after them.
"""

import argparse
import codecs
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import shlex
import signal
import stat
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from common import (
    BadInput,
    Stopped,
    atomic_folder,
    atomic_write,
    exit_on_bad_input,
    exit_on_signal,
    lenient_streams,
    print0,
)
from data.download import download
from data.shards import find_shards, open_shard, shard_pattern, write_shard
from data.tokenizer import END_OF_TEXT, gpt2_encoding

SHARDS = Path(__file__).parent / "shards"
SHARD_TOKENS = 100_000_000
LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", *LINES_SUFFIXES)
TINYSHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

PYDOC_VAL_TOKENS = 20 * 1024 + 1  # for 20 validation batches of 8 × 128
TINYSHAKESPEARE_VAL_TOKENS = 32_768  # as in llm.c
TEXT_VAL_TOKENS = 32_768  # at most, or a tenth of a small corpus

DOCUMENTS_PER_TASK = 64
TASKS_PER_WORKER = 4

STATE = "state.json"
"""progress of an interrupted preparation; see `_Progress`"""
DEFAULT_BATCH, DEFAULT_LENGTH, DEFAULT_TOKENS = 8, 128, 1024
"""B and T of train.py's defaults on a CPU; and the tokens of its smallest default batch, there and on a GPU"""


class Document(NamedTuple):
    name: str
    """its origin, for messages"""
    text: str


def pydoc_documents() -> list[Document]:
    """The topics of Python's language reference, which comes with every CPython, in random order.

    Validation takes the first tokens. In alphabetical order they would be about other topics than training.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(42).shuffle(names)
    return [Document(f"the topic {name}", topics[name]) for name in names]


def text_documents(paths: list[str], field: str, left_out: Counter[str]) -> Iterator[Document]:
    """One document per text file, per line of a .jsonl or .ndjson file, and per record of a .json file.

    In folders, hidden files and folders, links and files with other endings are skipped; a link could lead anywhere. A
    file that is found twice is read once.

    Args:
        paths: files, folders, or "-" for standard input.
        field: name of the text in a JSON record.
        left_out: counts skipped files by reason.

    Raises:
        BadInput: a path does not exist or holds no text; a record is not JSON, or lacks the field.
    """
    seen: set[tuple[int, int]] = set()
    for path in paths:
        if path == "-":
            text = _decode(sys.stdin.buffer.read(), "standard input")
            _refuse_json(text, "standard input")
            yield Document("standard input", text)
            continue
        root = Path(path)
        if not os.path.exists(root):
            raise BadInput(f"{path}: no such file or folder; give paths of text, or - for standard input")
        in_folder = root.is_dir()
        files = _text_files(root, left_out) if in_folder else [root]
        if not files:
            endings = ", ".join(TEXT_SUFFIXES)
            raise BadInput(
                f"{path}: no file below it ends in {endings}{_list_skipped(left_out)}; name the files themselves"
            )
        for file in files:
            with _opened(file, follow=not in_folder) as opened:
                status = os.fstat(opened.fileno())
                if stat.S_ISREG(status.st_mode):
                    if (status.st_dev, status.st_ino) in seen:
                        left_out["given twice"] += 1
                        continue
                    seen.add((status.st_dev, status.st_ino))
                suffix = file.suffix.lower()
                if suffix in LINES_SUFFIXES:
                    yield from _json_lines(opened, file, field)
                elif suffix == ".json":
                    yield from _json_records(opened, file, field)
                else:
                    text = _decode(opened.read(), file)
                    if suffix not in TEXT_SUFFIXES:
                        _refuse_json(text, file)
                    yield Document(str(file), text)


def _text_files(root: Path, left_out: Counter[str]) -> list[Path]:
    """The text files below a folder, sorted. Counts the others."""

    def unreadable(error: OSError) -> None:
        left_out["folders that cannot be read"] += 1

    files = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        for name in [*subfolders, *names]:
            path = Path(folder, name)
            ending = "".join(c if c.isprintable() else "?" for c in path.suffix.lower())
            if name.startswith("."):
                left_out["hidden"] += 1
            elif path.is_symlink():
                left_out["links"] += 1
            elif name in subfolders:
                continue
            elif ending not in TEXT_SUFFIXES:
                left_out[f"ending in {ending}" if ending else "without an ending"] += 1
            elif not path.is_file():
                left_out["no regular files"] += 1
            else:
                files.append(path)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # os.walk follows no links
    return sorted(files)


def _list_skipped(left_out: Counter[str]) -> str:
    """The skipped files, in parentheses."""
    kinds = [f"{n} {kind}" for kind, n in left_out.most_common()]
    if kinds[10:]:
        kinds[10:] = [f"{sum(n for _, n in left_out.most_common()[10:])} others"]
    return f" (not read: {', '.join(kinds)})" if kinds else ""


def tinyshakespeare_documents() -> Iterator[Document]:
    """The speeches of tiny Shakespeare, downloaded, split at blank lines as in llm.c.

    Raises:
        BadInput: the download failed.
    """
    otherwise = "fetch it by other means and give it to: python -m data.prepare text FILE"
    text = _decode(download("tinyshakespeare", TINYSHAKESPEARE, otherwise), TINYSHAKESPEARE)
    speeches = text.split("\n\n")
    for number, speech in enumerate(speeches, start=1):
        yield Document(f"speech {number}", speech + ("\n\n" if number < len(speeches) else ""))


def fineweb_documents(sample: str, skip: int = 0) -> Iterator[Document]:
    """Web pages of FineWeb (Penedo et al. 2024, https://arxiv.org/abs/2406.17557), streamed from the network.

    Args:
        sample: "10B" or "100B", its number of tokens.
        skip: number of pages to skip at the start.

    Raises:
        BadInput: the library is not installed, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise BadInput("fineweb needs the library datasets: pip install -e '.[datasets]'") from error
    try:
        pages = datasets.load_dataset("HuggingFaceFW/fineweb", name=f"sample-{sample}T", split="train", streaming=True)
        for number, page in enumerate(pages.skip(skip) if skip else pages, start=skip + 1):
            yield Document(f"page {number} of FineWeb", page["text"])
    except Exception as error:  # depends on the HTTP client
        raise BadInput(
            f"fineweb cannot be fetched from Hugging Face's hub ({str(error) or type(error).__name__}); check the "
            "network, or prepare text of your own with: python -m data.prepare text PATH"
        ) from error


def prepare(
    documents: Iterable[Document],
    output_dir: Path,
    val_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
) -> dict[str, int]:
    """Tokenise documents into `val_*.bin` and `train_*.bin`.

    Args:
        documents: texts; each becomes end-of-text and its tokens.
        output_dir: a new or empty folder. The shards appear in it once all are complete.
        val_tokens: number of tokens, from the start of the stream, for validation; None for a tenth of the corpus, at
            most 32,768.
        shard_tokens: tokens per shard; the last one of each kind has the rest.
        workers: number of processes that tokenise; 1 for this one.

    Returns:
        Number of tokens of each kind: {"val": ..., "train": ...}.

    Raises:
        BadInput: the folder is not empty or cannot be written, a document cannot be tokenised, or nothing is left to
            train on.
    """
    with atomic_folder(output_dir) as folder, contextlib.closing(_tokenise(documents, workers)) as tokenised:
        stream = _TokenStream(tokenised)
        if val_tokens is None:
            val_tokens = min(TEXT_VAL_TOKENS, stream.hold(10 * TEXT_VAL_TOKENS) // 10)
        counts = {"val": 0, "train": 0}
        _write_shards(stream, folder, counts, val_tokens, shard_tokens)
    return counts


def prepare_resumably(
    corpus: str,
    documents_behind: Callable[[int], Iterable[Document]],
    output_dir: Path,
    val_tokens: int,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
) -> dict[str, int]:
    """Like `prepare`, but finished shards are kept after a failure, and the same call resumes after them.

    Until all shards are complete they are in a hidden folder inside `output_dir`.

    Args:
        corpus: its name; only a call with the same one resumes.
        documents_behind: returns the documents after the first n, the same at every call.

    Raises:
        BadInput: as in `prepare`; or unfinished shards are of other settings or another corpus, or damaged.
    """
    settings = {"corpus": corpus, "val_tokens": val_tokens, "shard_tokens": shard_tokens}
    with atomic_folder(output_dir, state=STATE) as folder:
        progress = _Progress.read(folder, settings)
        counts = {"val": progress.val, "train": progress.train}
        documents = documents_behind(progress.documents)
        try:
            with contextlib.closing(_tokenise(documents, workers)) as tokenised:
                stream = _TokenStream(tokenised, progress.documents)
                if any(counts.values()):
                    print0(f"resuming behind {sum(counts.values()):,} tokens that are finished")
                    _skip(stream, progress.tokens, folder, "train" if counts["train"] else "val")

                def finished_one() -> None:
                    _Progress(settings, stream.documents, stream.tokens, **counts).write(folder)

                _write_shards(stream, folder, counts, val_tokens, shard_tokens, finished_one)
        except (BadInput, Stopped) as error:
            if any(counts.values()):
                error.args = (f"{error}; the finished shards stay, and the same command resumes behind them",)
            raise
    return counts


class _Progress(NamedTuple):
    """Content of state.json, from which an interrupted preparation resumes."""

    settings: dict[str, Any]
    """must be the same when it resumes"""
    documents: int
    """number of documents whose tokens are all in finished shards"""
    tokens: int
    """number of tokens of the next documents that are in finished shards too"""
    val: int
    """number of tokens in finished shards, of each kind"""
    train: int

    @classmethod
    def read(cls, folder: Path, settings: dict[str, Any]) -> "_Progress":
        """Read a folder's state and check it against its shards. Removes shards that are not in the state."""
        path = folder / STATE
        if not path.exists():
            found = cls(settings, 0, 0, 0, 0)
        else:
            again = f"remove {folder} to start again"
            try:
                found = cls(**json.loads(path.read_bytes()))
                if not all(type(n) is int and n >= 0 for n in found[1:]) or not isinstance(found.settings, dict):
                    raise ValueError("a value that is no count")
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise BadInput(f"{path} cannot be used ({error}); {again}") from error
            for name, value in settings.items():
                there = found.settings.get(name)
                if there != value:
                    raise BadInput(
                        f"{folder} holds unfinished shards of {name} {there!r}, and this command has {value!r}; give "
                        f"that, name another --output_dir, or {again}"
                    )
        known = set()
        for kind in ("val", "train"):
            left = getattr(found, kind)
            for index in range(-(-left // settings["shard_tokens"])):
                path = _shard_path(folder, kind, index)
                left -= len(open_shard(path))
                known.add(path)
            if left:
                raise BadInput(f"{folder}: its shards have other lengths than its {STATE} says; {again}")
        for path in folder.glob("*_*.bin"):
            if path not in known:
                path.unlink()
        return found

    def write(self, folder: Path) -> None:
        with atomic_write(folder / STATE) as file:
            file.write(json.dumps(self._asdict()).encode())


def _skip(stream: "_TokenStream", n_tokens: int, folder: Path, kind: str) -> None:
    """Skip the tokens that are in finished shards. Checks that the last shard ends with them."""
    skipped = stream.take(n_tokens)
    last = open_shard(find_shards(shard_pattern(folder, kind))[-1])
    n = min(len(last), n_tokens)
    if len(skipped) < n_tokens or not np.array_equal(skipped[n_tokens - n :], last[len(last) - n :]):
        raise BadInput(f"the corpus is another than the one in {folder}; remove that to start again")


def prepare_pydoc() -> Path:
    """The folder of the embedded corpus, prepared at the first call. Safe in several processes at once."""
    folder = SHARDS / f"pydoc-{sys.version_info.major}.{sys.version_info.minor}"
    complete = _shard_path(folder, "train", 0)  # the last one to appear
    if not complete.exists():
        try:
            counts = prepare(pydoc_documents(), folder, PYDOC_VAL_TOKENS)
            print0(
                f"tokenised Python's language reference into {folder}: {counts['train']:,} + {counts['val']:,} tokens"
            )
        except BadInput:
            if not complete.exists():  # otherwise another process was faster
                raise
    return folder


class _TokenStream:
    """Tokens of documents, taken in pieces of any size.

    Args:
        tokenised: pairs of a number of documents and their tokens.
        documents: number of documents before them.
    """

    def __init__(self, tokenised: Iterator[tuple[int, np.ndarray]], documents: int = 0):
        self._tokenised = tokenised
        self._held: deque[tuple[int, np.ndarray]] = deque()
        self._n_held = 0
        # The position: documents whose tokens were all taken, and tokens taken of the next ones.
        self.documents, self.tokens = documents, 0

    def hold(self, n_tokens: int) -> int:
        """Read until n_tokens are held or the stream ends. Returns how many are held."""
        while self._n_held < n_tokens:
            held = next(self._tokenised, None)
            if held is None:
                break
            self._held.append(held)
            self._n_held += len(held[1])
        return self._n_held

    def take(self, n_tokens: int) -> np.ndarray:
        """The next n_tokens, or fewer at the end of the stream."""
        left = min(n_tokens, self.hold(n_tokens))
        pieces = [np.zeros(0, np.uint16)]
        while left:
            n_documents, tokens = self._held[0]
            pieces.append(tokens[self.tokens : self.tokens + left])
            left -= len(pieces[-1])
            self._n_held -= len(pieces[-1])
            self.tokens += len(pieces[-1])
            if self.tokens == len(tokens):
                self._held.popleft()
                self.documents, self.tokens = self.documents + n_documents, 0
        return np.concatenate(pieces)


def _shard_path(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}_{index:06d}.bin"


def _write_shards(
    stream: _TokenStream,
    folder: Path,
    counts: dict[str, int],
    val_tokens: int,
    shard_tokens: int,
    finished_one: Callable[[], None] = lambda: None,
) -> None:
    """Write the stream as shards of both kinds, after the existing ones. `counts` has their tokens, and is updated."""
    for kind in counts:
        while True:
            tokens = stream.take(min(shard_tokens, val_tokens - counts["val"]) if kind == "val" else shard_tokens)
            if len(tokens) == 0:
                break
            write_shard(_shard_path(folder, kind, -(-counts[kind] // shard_tokens)), tokens)
            counts[kind] += len(tokens)
            finished_one()
    if counts["train"] == 0:
        raise BadInput(
            f"the corpus has {counts['val']} tokens and --val_tokens takes {val_tokens} of them: none is left to train "
            "on; give more text or a smaller --val_tokens"
        )


def _tokenise(documents: Iterable[Document], workers: int) -> Generator[tuple[int, np.ndarray], None, None]:
    """Pairs of a number of documents and their tokens, in order, with a progress bar on a terminal."""
    documents = iter(documents)
    tasks = iter(lambda: list(itertools.islice(documents, DOCUMENTS_PER_TASK)), [])
    results = (tokenise_task(task) for task in tasks) if workers == 1 else _in_workers(tasks, workers)
    with contextlib.closing(results), tqdm(unit=" tokens", unit_scale=True, disable=None, leave=False) as progress:
        for n_documents, tokens in results:
            progress.update(len(tokens))
            yield n_documents, tokens


def _in_workers(tasks: Iterator[list[Document]], workers: int) -> Generator[tuple[int, np.ndarray], None, None]:
    """Results of tasks in their order, from processes that have one task at a time.

    One thread at a time talks to a process through a pipe of its own, so either end notices at once if the other dies,
    where a multiprocessing.Pool waits for ever. The processes are spawned, because a fork would copy the locks of
    threads in the corpus's library.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def ask(task: list[Document]) -> tuple[int, np.ndarray]:
        connection = idle.get()
        try:
            connection.send(task)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise BadInput(
                f"a process that tokenises died with {task[0].name} to {task[-1].name} at hand; if memory ran out, "
                "give fewer --workers"
            ) from error
        finally:
            idle.put(connection)
        if isinstance(answer, BadInput):
            raise answer
        return answer

    threads = ThreadPoolExecutor(workers)
    pending: deque[Future[tuple[int, np.ndarray]]] = deque()
    try:
        while True:
            # Not all at once, or the whole corpus would be in memory.
            for task in itertools.islice(tasks, TASKS_PER_WORKER * workers - len(pending)):
                if len(processes) < workers:  # a small corpus needs few
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(theirs,), daemon=True)
                    process.start()
                    theirs.close()
                    processes.append(process)
                    idle.put(ours)
                pending.append(threads.submit(ask, task))
            if not pending:
                break
            yield pending.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def _work(connection: Connection) -> None:
    """Tokenise the tasks from a pipe until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends this process
    with contextlib.suppress(EOFError, OSError):
        while True:
            try:
                connection.send(tokenise_task(connection.recv()))
            except BadInput as error:
                connection.send(error)


def tokenise_task(task: list[Document]) -> tuple[int, np.ndarray]:
    """Tokenise documents.

    Returns:
        (number of documents, (n,) uint16 tokens: end-of-text and its own tokens for each document)

    Raises:
        BadInput: GPT-2's tokenizer fails on a document.
    """
    encoding = gpt2_encoding()
    ids: list[int] = []
    with _silent():
        for name, text in task:
            ids.append(END_OF_TEXT)
            try:
                ids.extend(encoding.encode_ordinary(text))  # <|endoftext|> in a text stays text
            except BaseException as error:
                # A panic in tiktoken's Rust code is not an Exception, and its class cannot be imported.
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                raise BadInput(
                    f"{name}: GPT-2's tokenizer fails on it ({str(error) or type(error).__name__}); leave it out, or "
                    "break up its longest runs of blanks"
                ) from None
    return len(task), np.array(ids, np.uint16)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence standard error, where a panic in Rust code prints lines besides the exception."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed already
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def _opened(file: Path, follow: bool) -> Iterator[Any]:
    """Open a file for reading. Without follow, a file that has become a link since it was found is refused."""
    no_follow = 0 if follow else getattr(os, "O_NOFOLLOW", 0)  # missing on Windows
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | no_follow)) as opened:
            yield opened
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error


def _decode(content: bytes, source: Path | str) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{source}: byte {error.start} is no UTF-8; convert it first, or leave it out") from error


def _refuse_json(text: str, source: Path | str) -> None:
    """Refuse JSON where text is expected: a model would learn the braces."""
    if text.lstrip()[:1] not in ("{", "["):
        return
    for part in (text.lstrip().partition("\n")[0], text):
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(part), dict | list):
                raise BadInput(f"{source} is JSON, not text; give it as a file that ends in .json or .jsonl")


def _json_lines(lines: Iterable[bytes], file: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        yield _document(_loads(line, where), where, field)


def _json_records(opened: Any, file: Path, field: str) -> Iterator[Document]:
    """The records of a .json file: an array of them, a single one, or one per line."""
    content = opened.read().removeprefix(codecs.BOM_UTF8)
    try:
        records = json.loads(content)
    except (ValueError, RecursionError):
        yield from _json_lines(content.splitlines(), file, field)
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], start=1):
        yield _document(record, f"{file}, record {number}", field)


def _loads(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: malformed JSON ({error}); correct or remove the line") from error


def _document(record: Any, where: str, field: str) -> Document:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise BadInput(f"{where}: no text in the field {field!r}; name it with --field")
    return Document(where, text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see python -m data.prepare --help")


def _count(text: str) -> int:
    """A whole number that fits into a shard's header. 1e8 is allowed too."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value.is_integer() and 1 <= value < 2**31):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 to {2**31 - 1}")
    return int(value)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    lenient_streams()
    common = _Parser(add_help=False)
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

    with exit_on_bad_input("data.prepare"), exit_on_signal("data.prepare"):
        args = parser.parse_args(argv)
        output_dir = args.output_dir or SHARDS / args.corpus
        left_out: Counter[str] = Counter()
        if args.corpus == "fineweb":
            counts = prepare_resumably(
                f"fineweb sample-{args.sample}T",
                lambda skip: fineweb_documents(args.sample, skip),
                output_dir,
                args.val_tokens or args.shard_tokens,
                args.shard_tokens,
                args.workers,
            )
        else:
            documents: Iterable[Document]
            val_tokens: int | None
            if args.corpus == "pydoc":
                documents, val_tokens = pydoc_documents(), PYDOC_VAL_TOKENS
            elif args.corpus == "text":
                documents, val_tokens = text_documents(args.paths, args.field, left_out), None
            else:
                documents, val_tokens = tinyshakespeare_documents(), TINYSHAKESPEARE_VAL_TOKENS
            counts = prepare(documents, output_dir, args.val_tokens or val_tokens, args.shard_tokens, args.workers)
        print0(f"{output_dir}: {counts['train']:,} tokens to train on, {counts['val']:,} to validate with")
        if left_out:
            print0(_list_skipped(left_out).strip(" ()"))
        _print_flags(output_dir)


def _print_flags(output_dir: Path) -> None:
    """Print the command that trains on the shards of a folder, quoted for a shell."""
    flags, smallest = [], []
    for flag, kind in (("--input_bin", "train"), ("--input_val_bin", "val")):
        pattern = shard_pattern(output_dir, kind)
        lengths = [len(open_shard(file)) for file in output_dir.glob(f"{kind}_*.bin")]
        if lengths and min(lengths) < 2:
            print0(
                f"a {kind} shard has {min(lengths)} token and a step reads at least 2: give more text, "
                "or other --val_tokens or --shard_tokens"
            )
            if kind == "train":
                return
        elif lengths:
            flags += [flag, pattern]
            smallest.append(min(lengths))
    room = min(smallest) - 1  # a micro-batch reads B·T + 1 tokens
    if room < DEFAULT_TOKENS:
        # Powers of two, so that they divide train.py's default tokens per update.
        length = min(DEFAULT_LENGTH, 1 << room.bit_length() - 1)
        batch = min(DEFAULT_BATCH, 1 << (room // length).bit_length() - 1)
        flags += ["--batch_size", str(batch), "--sequence_length", str(length)]
    print0(f"train on them: python train.py {shlex.join(flags)}")


if __name__ == "__main__":
    main()
