"""What every part uses: the error for bad input, files and folders that appear complete or not at all, locks on
folders, lines on the screen."""

import atexit
import contextlib
import errno
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import BinaryIO, NoReturn, TextIO

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


PART = ".part"
"""Ending of a hidden file or folder that is still being written."""
UNFINISHED = ".unfinished"
"""Folder inside an output folder with work that the same command resumes."""
LONGEST_MESSAGE = 1600
"""characters"""


class BadInput(Exception):
    """Input that cannot be used. The message is one line that names the flag or the file and says what to do.

    What it quotes may come from anybody: characters that control a terminal are written as escapes, and the middle of a
    message of more than LONGEST_MESSAGE characters is left out.
    """

    def __init__(self, message: str):
        text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
        half = LONGEST_MESSAGE // 2
        super().__init__(text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}")


class Stopped(BaseException):
    """A signal asked the program to end. The message is one line."""


@contextlib.contextmanager
def exit_on_bad_input(program: str) -> Iterator[None]:
    """Turn BadInput into one line on standard error and exit status 2; every other exception passes through."""
    try:
        yield
    except BadInput as error:
        rank = f" [rank {os.environ['RANK']}]" if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1" else ""
        print_error(f"{program}{rank}: {' '.join(str(error).split())}")
        raise SystemExit(2) from None


@contextlib.contextmanager
def exit_on_signal(program: str) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into Stopped, so that unfinished files are removed on the way out; then print one
    line and exit with 128 + the signal's number. For the main thread."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the removal
        received.append(number)
        sys.unraisablehook = lambda _: None  # an object whose constructor this cuts may raise when it is deleted
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    handlers = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    # What is ignored stays so: SIGHUP under nohup, SIGINT in the background.
    handlers = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in handlers:
            signal.signal(number, stop)
        yield
    except Stopped as stopped:
        print_error(f"{program}: {stopped}")
        raise SystemExit(128 + received[0]) from None
    finally:
        for number, old in handlers.items():
            signal.signal(number, old)


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` (full, read-only, not a folder) into BadInput."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInput(f"cannot write {path}: {reason}; free some space or choose another place") from error


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` once it is complete and on disk.

    It is written beside its place and then renamed, so that a reader never sees half a file, and the old file stays
    until then. If anything goes wrong, the half-written file is removed.

    Raises:
        BadInput: the operating system refused, for example because the disk is full.
    """
    path = Path(path)
    # A name that nobody else has: process numbers repeat between containers, and could be guessed.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")
    with write_errors(path):
        file = open(part, "xb")  # noqa: SIM115 (closed below); "x" refuses files that exist, and links
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def refuse_if_occupied(folder: Path, flag: str = "--output_dir", resumable: bool = False) -> None:
    """Raise BadInput unless `folder` is missing or empty.

    Hidden leftovers of killed processes are ignored, and so is the lost+found of a mounted disk.

    Args:
        folder: where something is about to be written.
        flag: the flag that names it, for the message.
        resumable: whether unfinished work is ignored too.
    """
    with write_errors(f"{flag} {folder}"):  # it may not even be looked at
        if folder.is_dir():
            names = [name for name in os.listdir(folder) if not _is_part(name) and name != "lost+found"]
            if names == [UNFINISHED] and not resumable:
                raise BadInput(
                    f"{flag} {folder} holds unfinished work of another command in {UNFINISHED}; repeat that "
                    "command, or name a new folder"
                )
            if set(names) - {UNFINISHED}:
                raise BadInput(f"{flag} {folder} is not empty; name a new folder, so that nothing is overwritten")
        elif os.path.lexists(folder):
            raise BadInput(f"{flag} {folder} is a file; name a folder")


@contextlib.contextmanager
def atomic_folder(path: str | Path, flag: str = "--output_dir", state: str | None = None) -> Iterator[Path]:
    """Give a folder to write into, whose files appear in `path` together when the block ends.

    A new `path` is filled beside its place and then renamed. An empty folder may be a mount point, which cannot be
    renamed over: it is locked, filled in a hidden folder inside it, and the files are renamed in reverse alphabetical
    order, so that train_000000.bin or config.json comes last. If anything goes wrong, all that was made here is
    removed, and nothing else.

    Args:
        path: a missing or an empty folder.
        flag: the flag that names it, for messages.
        state: name of a file that makes the work resumable. Once the given folder has it, a failure removes nothing,
            and the next call for the same `path` gives the same folder. It does not appear in `path`.

    Raises:
        BadInput: `path` is not empty, another process fills it, or it cannot be written.
    """
    refuse_if_occupied(Path(path), flag, bool(state))
    path = Path(path).resolve()
    with contextlib.ExitStack() as held:
        with write_errors(path):
            for folder in [folder for folder in (path, *path.parents) if not folder.exists()][::-1]:
                held.callback(_remove_if_empty, folder)
            (path if state else path.parent).mkdir(parents=True, exist_ok=True)
        in_place = path.is_dir()
        if in_place:
            with write_errors(path):
                held.enter_context(exclusive(path, flag))
            refuse_if_occupied(path, flag, bool(state))  # another process may have filled it before it was locked
        with write_errors(path):
            if state:
                outer = part = path / UNFINISHED
                _make_own_folder(part)
            else:
                outer = Path(tempfile.mkdtemp(PART, f".{path.name}.", path if in_place else path.parent))
                part = outer / path.name
        held.callback(_remove_unless, outer, state)
        with write_errors(path):
            part.mkdir(exist_ok=bool(state))  # with the usual permissions; only the folder around it is private
        yield part
        with write_errors(path):
            if in_place:
                _move_contents(part, path, state)
            else:
                os.rename(part, path)


def _is_part(name: str) -> bool:
    return name.startswith(".") and name.endswith(PART)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove_unless(folder: Path, state: str | None) -> None:
    """Remove a folder that this process made, unless its work can be resumed."""
    if not (state and (folder / state).exists()):
        shutil.rmtree(folder, ignore_errors=True)


def _make_own_folder(folder: Path) -> None:
    """Make a folder that only this user can write to, or take the one that an earlier process made."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    own = found.st_uid == os.geteuid() if hasattr(os, "geteuid") else True  # Windows
    if not (stat.S_ISDIR(found.st_mode) and own and not found.st_mode & 0o022):
        raise BadInput(f"{folder} is no folder that only you can write to; remove it, or name another folder")


def _move_contents(part: Path, path: Path, state: str | None) -> None:
    """Rename all of `part` but the state into `path`, in reverse alphabetical order: everything or nothing."""
    names = sorted((name for name in os.listdir(part) if name != state and not _is_part(name)), reverse=True)
    try:
        for name in names:
            if os.path.lexists(path / name):
                raise FileExistsError(errno.EEXIST, f"{name} is there already")
            os.rename(part / name, path / name)
        if state:
            (part / state).unlink()
    except BaseException:
        for name in names:
            if not os.path.lexists(part / name):
                os.rename(path / name, part / name)
        raise


@contextlib.contextmanager
def exclusive(folder: Path, flag: str) -> Iterator[None]:
    """Lock an existing folder against other processes that call this, until the block ends or this process dies.

    Where folders have no locks, as on NFS, nobody is kept out.

    Args:
        folder: an existing one.
        flag: the flag that names it, for the message.

    Raises:
        BadInput: another process has locked it.
    """
    if not fcntl:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{flag} {folder}: another run writes to it; wait for its end, or name another") from error
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(descriptor)


def print0(line: str) -> None:
    """Print a line on standard output, on rank 0 only. torchrun's environment variables tell which rank this is."""
    if os.environ.get("WORLD_SIZE") in (None, "", "1") or os.environ.get("RANK") == "0":
        _print(line, sys.stdout)


def print_error(line: str) -> None:
    """Print a line on standard error, on every rank that calls this."""
    _print(line, sys.stderr)


def _print(line: str, stream: TextIO) -> None:
    """Print a line at once.

    Control characters are printed as escapes, so that a name in a stranger's file cannot control the terminal. A
    reader that is gone (`| head`) or a full disk does not stop the program.
    """
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in line)
    with contextlib.suppress(OSError):
        print(shown, file=stream, flush=True)


def lenient_streams() -> None:
    """Make the standard streams of this process accept every line. For the start of a `main`.

    Characters that the terminal cannot show are printed as escapes. A closed stream is opened on the null device:
    otherwise the next file that is opened gets its number, and the output of libraries.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (for good)
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    atexit.register(_drop_unwritten)


def _drop_unwritten() -> None:
    """Drop what a closed pipe or a full disk did not take: Python's last flush would change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
