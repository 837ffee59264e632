"""Reading files that may come from anybody: only regular files, and JSON of a known shape.

They raise OSError if a file cannot be opened, and ValueError if its content is wrong. The caller knows which flag named
the file, and turns either into one line.
"""

import errno
import io
import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

JSON_LIMIT = 16 << 20
"""bytes; parsed, JSON takes up to 25 times as much memory"""


def open_regular(path: str | Path, follow: bool = False, limit: int | None = None) -> io.BufferedReader:
    """Open a regular file for reading: a FIFO would block, and a device may have no end.

    Args:
        path: the file.
        follow: follow a link, as where the user has named it. A link inside a folder that the user has named could lead
            out of it.
        limit: the most bytes that it may have.

    Raises:
        OSError: it cannot be opened, is a link or no regular file, or is too large.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    _refuse_irregular(path, os.stat(path, follow_symlinks=follow), limit)  # opening a device may already do something
    descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    try:
        _refuse_irregular(path, os.fstat(descriptor), limit)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_irregular(path: str | Path, found: os.stat_result, limit: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, "it is a link, and only files in the folder itself are read", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if limit is not None and found.st_size > limit:
        raise OSError(errno.EFBIG, f"its {found.st_size:,} bytes are more than {limit:,}", str(path))


def refuse_beyond_memory(n_bytes: int) -> None:
    """Refuse what does not fit in memory, before it is allocated.

    Raises:
        ValueError: the physical memory is smaller. If the operating system does not tell its size, nothing is refused.
    """
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if n_bytes > memory:
            raise ValueError(f"it takes {n_bytes / 2**30:,.1f} GiB, and this machine has {memory / 2**30:,.1f}")


# JSON


class Check(NamedTuple):
    """A condition on a value in a JSON file."""

    told: str
    """the condition in words, after "must be" """
    holds: Callable[[Any], bool]


def integer(low: int = 0, high: int = 2**63 - 1) -> Check:
    """An integer; true and 1.0 are none."""
    return Check(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Check:
    """A finite number."""
    return Check(
        f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high
    )


def text(pattern: str) -> Check:
    """A string that matches a regular expression from end to end."""
    return Check(
        f"a string like {pattern}", lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value))
    )


def one_of(*values: Any) -> Check:
    """One of these values, of the same type."""
    return Check(
        " or ".join(map(repr, values)), lambda value: any(type(value) is type(v) and value == v for v in values)
    )


def either(*checks: Check) -> Check:
    """A value that one of the checks accepts."""
    return Check(" or ".join(c.told for c in checks), lambda value: any(c.holds(value) for c in checks))


def listed(check: Check, low: int = 0, high: int = JSON_LIMIT) -> Check:
    """A list of `low` to `high` values, each of which the check accepts."""
    return Check(
        f"a list of {low} to {high} values, each {check.told}",
        lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(check.holds, value)),
    )


def mapped(check: Check) -> Check:
    """An object whose values the check accepts."""
    return Check(
        f"an object with values, each {check.told}",
        lambda value: isinstance(value, dict) and all(map(check.holds, value.values())),
    )


def parse_json(content: bytes) -> Any:
    """Parse strict JSON: Python's parser would accept NaN and infinities too.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("too many brackets in each other") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_json(path: str | Path, schema: Mapping[str, Any] | None = None, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read an object from a JSON file that is not a link.

    Args:
        path: the file.
        schema: see `require`.
        limit: the most bytes that the file may have.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is not JSON, or not of this shape.
    """
    with open_regular(path, limit=limit) as file:
        return require(parse_json(file.read(limit + 1)), schema or {})


def require(value: Any, schema: Mapping[str, Any], where: str = "") -> Any:
    """Check the fields of a value, and return it.

    Args:
        value: from JSON.
        schema: by field, a `Check` or another schema; a field whose name ends in "?" may be missing. Fields that are
            not in the schema are ignored.
        where: the names of the fields above.

    Raises:
        ValueError: a field is missing or wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'its content'} is {reprlib.repr(value)}, and must be an object")
    for key, check in schema.items():
        name, optional = key.removesuffix("?"), key.endswith("?")
        field = f"{where}.{name}" if where else name
        if name not in value:
            if not optional:
                raise ValueError(f"{field} is missing")
        elif not isinstance(check, Check):
            require(value[name], check, field)
        elif not check.holds(value[name]):
            raise ValueError(f"{field} is {reprlib.repr(value[name])}, and must be {check.told}")
    return value
