"""Files of evaluations: downloaded by name, or given; read line by line or as a whole."""

import codecs
import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common import BadInput, atomic_write, write_errors
from data.download import download
from readers import open_regular, parse_json, require

FOLDER = Path(__file__).parent.parent / "data" / "evals"
"""where downloaded files stay"""
LIMIT = 1 << 30
"""bytes of a file; WikiText's has 1.3 MB, and HellaSwag's 12"""


class Source(NamedTuple):
    """A file on the network."""

    url: str
    sha256: str


SOURCES = {
    "hellaswag": Source(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "lambada": Source(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    # The test articles of WikiText-103, which are those of WikiText-2, in the smaller archive.
    "wikitext": Source(
        "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ),
}


def fetch(name: str) -> Path:
    """The file of an evaluation, downloaded at the first call.

    Raises:
        BadInput: it cannot be downloaded or written, or has another SHA-256 sum.
    """
    source = SOURCES[name]
    path = FOLDER / source.url.rpartition("/")[2]
    if not path.exists():
        content = download(name, source.url, f"fetch it by other means and give it: --data {path.name}", source.sha256)
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    elif hashlib.sha256(read_bytes(path)).hexdigest() != source.sha256:
        raise BadInput(f"{path} is damaged: its SHA-256 sum is not {source.sha256}; remove it, and it is fetched again")
    return path


def read_bytes(path: Path) -> bytes:
    """The content of a regular file that the user named.

    Raises:
        BadInput: it cannot be read, or has nothing in it.
    """
    try:
        with open_regular(path, follow=True, limit=LIMIT) as file:
            content = file.read()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}; name a file that exists") from error
    if not content.strip():
        raise BadInput(f"{path} is empty; name another file")
    return content


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        BadInput: it cannot be read, is empty or is no UTF-8.
    """
    return _decode(read_bytes(path), path)


def read_member(path: Path, name: str) -> str:
    """The text of a file in a zip archive.

    Raises:
        BadInput: it is no such archive, or lacks the file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path))) as archive:
            size = archive.getinfo(name).file_size
            if size > LIMIT:
                raise BadInput(f"{path}: {name} in it has {size:,} bytes, more than {LIMIT:,}; name another file")
            content = archive.read(name)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError) as error:
        raise BadInput(f"{path} is no archive with {name} in it ({error}); name another file") from error
    return _decode(content, f"{name} in {path}")


def _decode(content: bytes, source: Path | str) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{source}: byte {error.start} is no UTF-8; convert it first, or name another") from error


def json_lines(path: Path, schema: Mapping[str, Any], limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that has one per line, each with its place for messages. Blank lines are left out.

    Args:
        path: the file.
        schema: of every object; see `readers.require`.
        limit: most objects that are read.

    Raises:
        BadInput: the file cannot be read or is empty, or a line is not such an object.
    """
    found = 0
    for number, line in enumerate(read_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if found == limit:
            break
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, require(parse_json(line), schema)
            except ValueError as error:
                raise BadInput(f"{where}: {error}; correct or remove the line") from error
            found += 1
