"""Download of a single file that resumes after an interruption and verifies the contents before the final rename.

The bytes received so far are in a file with the suffix ``.part``. A later call requests only the missing bytes.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imaml.errors import InputError
from imaml.storage.files import put_in_place

TIMEOUT = 30.0
"""Seconds without data from the server after which a connection counts as lost."""
ATTEMPTS = 5
"""Greatest number of requests for the rest of a file. A failed request is repeated only if ``.part`` has grown."""
CHUNK = 64 * 1024


class Unreachable(InputError):
    """A failure of the network or the server. The bytes received so far are kept for the next call."""


def fetch(
    url: str,
    path: Path,
    check: Callable[[bytes], object],
    limit: int,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Download ``url`` to ``path``, resuming from ``path`` with the suffix ``.part`` if that file exists.

    Args:
        url: an http or https address.
        path: the file to create or replace. No other process may write to its folder during the call.
        check: called with the complete contents; raises :class:`.InputError` if they are wrong.
        limit: greatest size in bytes. A larger file is refused without reading the rest.
        on_progress: called after each chunk with the number of bytes on disk and the total size. The size is None if
            the server does not send it.

    Raises:
        Unreachable: if the server cannot be reached, answers with an error, ends the connection early, or sends nothing
            for ``TIMEOUT`` seconds.
        InputError: if the address is not http or https, if the file is larger than ``limit``, or if ``check`` refuses
            the contents. In the last two cases the downloaded bytes are deleted. If ``check`` refuses a resumed file,
            the whole file is first downloaded once more.
        OSError: if the folder cannot be written.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError(f"{url} is not an http or https address")
    part = path.with_name(f"{path.name}.part")
    resumed = part.exists()
    _fetch_all(url, part, limit, on_progress)
    try:
        check(part.read_bytes())
    except InputError:
        part.unlink()
        if not resumed:
            raise
        # The bytes of the earlier call may be damaged or belong to another file.
        return fetch(url, path, check, limit, on_progress)
    put_in_place(part, path)


def _fetch_all(url, part, limit, on_progress):
    for attempt in range(1, ATTEMPTS + 1):
        before = _size(part)
        try:
            return _fetch_rest(url, part, limit, on_progress)
        except Unreachable:
            if attempt == ATTEMPTS or _size(part) <= before:
                raise


def _fetch_rest(url, part, limit, on_progress):
    """Append the missing bytes to ``part``. If the server ignores the requested range, write the whole file instead."""
    received = _size(part)
    with _connected(url, received) as response:
        if response is None:
            return
        received = received if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length", "")
        total = received + int(length) if length.isdecimal() else None
        with part.open("ab" if received else "wb") as stream:
            for chunk in _chunks(url, response):
                received += len(chunk)
                if received > limit:
                    part.unlink()
                    raise InputError(f"{url} is larger than {limit:,} bytes, so it is not the expected file")
                stream.write(chunk)
                on_progress(received, total)
    if total is not None and received < total:
        raise Unreachable(f"{url}: the connection ended after {received:,} of {total:,} bytes")


@contextmanager
def _connected(url, received) -> Iterator[http.client.HTTPResponse | None]:
    """Request the bytes after the first ``received`` ones. Yield the response, or None if there are no more bytes."""
    # Refuse compression: a range of a compressed response could not be appended to the uncompressed part.
    headers = {"User-Agent": "imaml", "Accept-Encoding": "identity"} | (
        {"Range": f"bytes={received}-"} if received else {}
    )
    try:
        with _network_errors(url):
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except _NothingFollows:
        yield None
        return
    with response:
        yield response


class _NothingFollows(Exception):
    """The server reports that the requested range begins at or beyond the end of the file."""


def _chunks(url, response) -> Iterator[bytes]:
    while True:
        with _network_errors(url):
            chunk = response.read(CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _network_errors(url):
    """Convert errors of the network to :class:`Unreachable`, and HTTP status 416 to ``_NothingFollows``.

    After the conversion, an OSError can only come from the disk.
    """
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()  # an HTTPError is also the response and keeps the socket open until it is closed
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _NothingFollows from None
        raise Unreachable(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"{url}: the connection failed ({getattr(error, 'reason', None) or error})") from error


def _size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
