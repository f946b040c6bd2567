"""Fetching a dataset: whole, in parts, over a connection that breaks, from a server that errs, or from none at all."""

import http.server
import re
import socket
import threading
from pathlib import Path

import pytest

from imaml import cli
from imaml.datasets import omniglot, web
from imaml.errors import InputError
from imaml.storage import files

CONTENT = bytes(range(256)) * 1000


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at every address; its attributes say how well."""

    ranges = True
    status = 200
    breaks_after: list[int]  # of each answer the bytes after which its connection ends; then none does
    content = CONTENT

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks_after, self.asked = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wish = self.headers.get("Range")
        self.server.asked.append((self.path, wish))
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        content = self.server.content
        start = int(re.fullmatch(r"bytes=(\d+)-", wish)[1]) if wish and self.server.ranges else 0
        if wish and self.server.ranges and start >= len(content):
            self.send_error(416)
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.server.breaks_after:
            body = body[: self.server.breaks_after.pop(0)]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def check(content):
    if content != CONTENT:
        raise InputError("not what it should be")


def fetch(server, path, **options):
    web.fetch(f"{server.url}/file", path, **{"check": check, "limit": len(CONTENT), **options})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def wishes(server):
    return [wish for _, wish in server.asked]


def test_a_file_is_fetched_with_its_progress(server, tmp_path):
    seen = []
    fetch(server, tmp_path / "file", on_progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]
    done = [d for d, _ in seen]
    assert done == sorted(set(done)) and seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 1


def test_a_connection_that_breaks_is_gone_on_with(server, tmp_path):
    server.breaks_after = [1000, 0, 70_000]  # the second brings nothing: the call ends there
    with pytest.raises(web.Unreachable, match="the connection ended after 1,000 of 256,000 bytes"):
        fetch(server, tmp_path / "file")
    assert names(tmp_path) == ["file.part"] and (tmp_path / "file.part").read_bytes() == CONTENT[:1000]
    fetch(server, tmp_path / "file")
    assert wishes(server) == [None, "bytes=1000-", "bytes=1000-", "bytes=71000-"]
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]


def test_connections_that_all_break_are_not_tried_for_ever(server, tmp_path):
    server.breaks_after = [1] * 100
    with pytest.raises(web.Unreachable):
        fetch(server, tmp_path / "file")
    assert len(server.asked) == web.ATTEMPTS
    assert (tmp_path / "file.part").read_bytes() == CONTENT[: web.ATTEMPTS]


def test_a_server_that_knows_no_ranges_sends_it_all_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:5000])
    server.ranges = False
    fetch(server, tmp_path / "file")
    assert wishes(server) == ["bytes=5000-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_that_was_whole_only_gets_its_name(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(server, tmp_path / "file")
    assert wishes(server) == [f"bytes={len(CONTENT)}-"]
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]


@pytest.mark.parametrize("part", [b"something else", CONTENT + b"and more", bytes(len(CONTENT))])
def test_a_part_that_is_not_the_beginning_is_thrown_away_and_all_is_fetched(part, server, tmp_path):
    (tmp_path / "file.part").write_bytes(part)
    fetch(server, tmp_path / "file", limit=2 * len(CONTENT))
    assert wishes(server) == [f"bytes={len(part)}-", None]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_contents_are_thrown_away_and_the_old_file_stands(server, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(InputError, match="not what it should be"):
        fetch(server, tmp_path / "file")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_more_than_can_be_right_is_refused_before_it_is_on_disk(server, tmp_path):
    with pytest.raises(InputError, match="is larger than 1,000 bytes, so not the right file"):
        fetch(server, tmp_path / "file", limit=1000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status, reason", [(404, "Not Found"), (403, "Forbidden"), (500, "Internal Server Error")])
def test_a_server_that_refuses_is_quoted_and_asked_once(status, reason, server, tmp_path):
    server.status = status
    with pytest.raises(web.Unreachable, match=f"{server.url}/file: the server answers {status} {reason}") as caught:
        fetch(server, tmp_path / "file")
    assert len(server.asked) == 1 and names(tmp_path) == []
    assert caught.value.__cause__.closed  # an open socket would be a ResourceWarning in the user's program


def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_refused_connection_is_told(tmp_path):
    with pytest.raises(web.Unreachable, match=r"cannot be reached \(.*refused"):
        web.fetch(f"http://127.0.0.1:{closed_port()}/file", tmp_path / "file", check, 1)
    assert names(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(web.Unreachable, match=r"cannot be reached \(timed out\)"):
            web.fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/file", tmp_path / "file", check, 1)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/file", "/etc/passwd", ""])
def test_only_the_web_is_fetched_from(url, tmp_path):
    with pytest.raises(InputError, match="is no http or https address"):
        web.fetch(url, tmp_path / "file", check, 1)


@pytest.mark.parametrize("url", ["http://", "http://[bad/file", "http://a b/file", "http://127.0.0.1:x/file"])
def test_an_address_that_is_none_is_told(url, tmp_path):
    with pytest.raises(web.Unreachable, match="cannot be reached"):
        web.fetch(url, tmp_path / "file", check, 1)


def test_a_full_disk_is_not_taken_for_the_network(server, small_disk):
    server.content = bytes(600_000)
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(server, small_disk / "file", limit=10**6)
    assert not isinstance(caught.value, InputError) and len(server.asked) == 1
    assert names(small_disk) == ["file.part"]  # what came can be gone on from


# The command


@pytest.fixture
def official(monkeypatch, server, fresh_cache):
    """Two archives that the server has at every address, so small that what is right is a word."""
    monkeypatch.setattr(omniglot, "_verify", lambda archive, path, content: check(content))
    monkeypatch.setattr(omniglot, "URL", server.url)
    return [archive.file for archive in omniglot.ARCHIVES]


def test_the_command_fetches_both_archives_to_where_training_looks_for_them(official, server, capsys):
    assert cli.main(["data", "omniglot"]) == 0
    folder = omniglot.default_directory()
    assert names(folder) == [*official, files.LOCK]
    assert [path for path, _ in server.asked] == [f"/{name}" for name in official]
    said = capsys.readouterr().out
    assert f"fetching {server.url}/{official[0]} …" in said
    assert said.endswith(f"omniglot is whole in {folder}; train on it: imaml train omniglot-5way-1shot-gd\n")


def test_what_is_there_stays_and_what_is_damaged_is_fetched(official, server, tmp_path, capsys):
    (tmp_path / official[0]).write_bytes(CONTENT)
    (tmp_path / official[1]).write_bytes(CONTENT[:100])
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path), "--url", f"{server.url}/mirror/"]) == 0
    assert server.asked == [(f"/mirror/{official[1]}", None)]
    said = capsys.readouterr().out
    assert f"{tmp_path / official[0]} is there and whole" in said and said.endswith(f" --data {tmp_path}\n")


def test_without_a_network_the_command_says_what_to_put_where(official, tmp_path, capsys, monkeypatch):
    place = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setattr(omniglot, "URL", place)
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path / "new")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"imaml data: {place}/{official[0]} cannot be reached (")
    assert f"fetch {place}/{official[0]} and {place}/{official[1]} where there is a network" in sentence
    assert sentence.endswith(f"and put them into {tmp_path / 'new'}")
    assert names(tmp_path / "new") == [files.LOCK]


def test_a_mirror_with_other_data_is_refused(official, server, tmp_path, capsys):
    server.content = b"<!DOCTYPE html>"
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "imaml data: not what it should be\n"
    assert names(tmp_path) == [files.LOCK]


def test_two_downloads_into_one_folder_are_refused(official, tmp_path):
    with files.alone_in(tmp_path), pytest.raises(InputError, match="is in use by process"):
        omniglot.download(tmp_path)


def test_an_interrupted_download_keeps_its_part(official, server, tmp_path, capsys, monkeypatch):
    def interrupt(self, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr("imaml.report.progress.Reporter.transfer", interrupt)
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path)]) == 130
    part = tmp_path / f"{official[0]}.part"
    assert part.read_bytes() == CONTENT[: web.CHUNK]


def test_the_real_archives_pass_through_a_download(omniglot_directory: Path, tmp_path, server, fresh_cache):
    archive = omniglot.ARCHIVES[1]
    server.content = (omniglot_directory / archive.file).read_bytes()
    server.breaks_after = [3_000_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniglot, "ARCHIVES", (archive,))
        omniglot.download(tmp_path, server.url)
    assert (tmp_path / archive.file).read_bytes() == server.content
    assert wishes(server) == [None, "bytes=3000000-"]
