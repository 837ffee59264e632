"""What every part leans on: the error for bad input, files that are whole or not there, folders that are held,
lines on the screen."""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class BadInput(Exception):
    """Input that cannot be used. The message is one line that names the flag or the file and says what to do."""


@contextlib.contextmanager
def exit_on_bad_input(program: str) -> Iterator[None]:
    """Turn BadInput into one line on standard error and exit status 2; every other exception passes through."""
    try:
        yield
    except BadInput as error:
        rank = f" [rank {os.environ['RANK']}]" if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1" else ""
        tell(f"{program}{rank}: {' '.join(str(error).split())}", sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says against writing `path` (full, read-only, not a folder) into BadInput."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInput(f"cannot write {path}: {reason}; free some space or choose another place") from error


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only once it is whole and on disk.

    It is written beside its place and renamed into it, so that a reader never meets half a file and whatever stood
    there before stays until then. If anything goes wrong, the half-written file is removed.

    Raises:
        BadInput: the operating system refused, for example because the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with write_errors(path):
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: Path, flag: str) -> Iterator[None]:
    """Hold a folder against other processes that ask for it in the same way, until this one is done, or dead.

    Where there are no locks for folders, as on NFS, nobody is kept out.

    Args:
        folder: an existing one.
        flag: what named it, for the message.

    Raises:
        BadInput: another process holds it.
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


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line at once, to standard output unless told otherwise.

    Control characters are printed as escapes, so that a name that came with a file cannot steer the terminal. A reader
    that went away (`| head`) or a full disk under the screen is no reason to stop.
    """
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in line)
    with contextlib.suppress(OSError):
        print(shown, file=stream, flush=True)


def lenient_streams() -> None:
    """Make the standard streams of this process take every line, whatever they lead to. For the start of a `main`.

    Characters that the terminal cannot show are printed as escapes. A stream that is closed leads to the null device:
    otherwise the next file that is opened gets its number, and with it what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, which is this
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (for good)
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    atexit.register(_drop_what_nobody_takes)


def _drop_what_nobody_takes() -> None:
    """Keep Python's last flush, of what a closed pipe or a full disk did not take, from changing the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
