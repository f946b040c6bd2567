"""A file from the network: fetched in parts that a later call goes on from, and checked before it gets its name."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imaml.errors import InputError
from imaml.storage.files import put_in_place

TIMEOUT = 30.0
"""Seconds of silence after which a connection counts as lost."""
ATTEMPTS = 5
"""Connections for one file; a new one only where the last one brought something."""
CHUNK = 64 * 1024


class Unreachable(InputError):
    """The network or the server did not give the file; what came of it is kept."""


def fetch(
    url: str,
    path: Path,
    check: Callable[[bytes], object],
    limit: int,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Fetch ``url`` to ``path``; of a call that was cut short, ``path`` with ``.part`` behind it is gone on from.

    Args:
        url: http or https.
        path: in a folder that this process alone writes to.
        check: raises InputError for contents that are not the right ones.
        limit: bytes above which nothing right can be there.
        on_progress: told the bytes on disk and, where the server says so, how many there will be.

    Raises:
        Unreachable: where the server cannot be reached, refuses, or falls silent.
        InputError: for another kind of address, or contents that ``check`` refuses; they are thrown away.
        OSError: where the folder cannot be written.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError(f"{url} is no http or https address")
    part = path.with_name(f"{path.name}.part")
    begun = part.exists()
    _fetch_all(url, part, limit, on_progress)
    try:
        check(part.read_bytes())
    except InputError:
        part.unlink()
        if not begun:
            raise
        # The beginning may have been another file's, or damaged: once more, all of it.
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
    """Append to ``part`` what is missing of it, or write all of it where the server only sends that."""
    have = _size(part)
    with _connected(url, have) as response:
        if response is None:
            return
        have = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        with part.open("ab" if have else "wb") as stream:
            for chunk in _chunks(url, response):
                have += len(chunk)
                if have > limit:
                    part.unlink()
                    raise InputError(f"{url} is larger than {limit:,} bytes, so not the right file")
                stream.write(chunk)
                on_progress(have, total)
    if total is not None and have < total:
        raise Unreachable(f"{url}: the connection ended after {have:,} of {total:,} bytes")


@contextmanager
def _connected(url, have) -> Iterator[http.client.HTTPResponse | None]:
    """The server's answer to the wish for what follows the first ``have`` bytes; None where nothing does."""
    # Identity: a part of a compressed answer could not be gone on from.
    headers = {"User-Agent": "imaml", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with _told_apart(url):
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except _NothingFollows:
        yield None
        return
    with response:
        yield response


class _NothingFollows(Exception):
    pass


def _chunks(url, response) -> Iterator[bytes]:
    while True:
        with _told_apart(url):
            chunk = response.read(CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _told_apart(url):
    """What goes wrong with the network, told apart from what goes wrong with the disk."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()  # an HTTPError is also the server's answer and holds its socket; nobody else closes it
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _NothingFollows from None
        raise Unreachable(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"{url} cannot be reached ({getattr(error, 'reason', None) or error})") from error


def _size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
