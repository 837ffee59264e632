"""Download one file over HTTP."""

import hashlib
import http.client
import urllib.request

from tqdm import tqdm

from common import BadInput

TIMEOUT_S = 30
CHUNK_BYTES = 1 << 16


def download(name: str, url: str, otherwise: str, sha256: str | None = None) -> bytes:
    """The content of a file on the network, with a progress bar on a terminal.

    Args:
        name: of the file, for messages.
        url: its address.
        otherwise: what to do where there is no network, for messages.
        sha256: the sum that it has to have, in hexadecimal; None if it may change.

    Raises:
        BadInput: it cannot be fetched, was cut short, or has another sum.
    """
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            length = getattr(answer, "length", None)
            bar = tqdm(desc=name, total=length, unit="B", unit_scale=True, disable=None, leave=False)
            with bar:
                while chunk := answer.read(CHUNK_BYTES):
                    content += chunk
                    bar.update(len(chunk))
        if length is not None and len(content) < length:  # http.client tells only those who read all at once
            raise http.client.IncompleteRead(b"", length - len(content))
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise BadInput(
            f"{name} cannot be fetched from {url} ({getattr(error, 'reason', error)}); {otherwise}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise BadInput(f"{name} from {url} has the SHA-256 sum {found} instead of {sha256}; {otherwise}")
    return bytes(content)
