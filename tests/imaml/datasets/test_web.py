"""Downloads of a dataset: complete, resumed, over connections that break, from faulty servers, and without network."""

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
    """A server that answers every address with CONTENT, unless a test changes the attributes of the server."""

    ranges = True
    status = 200
    breaks_after: list[int]  # for each of the first responses, the number of bytes after which the connection breaks
    content = CONTENT

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks_after, self.requests = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        requested = self.headers.get("Range")
        self.server.requests.append((self.path, requested))
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        content = self.server.content
        start = int(re.fullmatch(r"bytes=(\d+)-", requested)[1]) if requested and self.server.ranges else 0
        if requested and self.server.ranges and start >= len(content):
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


def requested_ranges(server):
    return [requested for _, requested in server.requests]


def test_a_download_reports_its_progress(server, tmp_path):
    seen = []
    fetch(server, tmp_path / "file", on_progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]
    done = [d for d, _ in seen]
    assert done == sorted(set(done)) and seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 1


def test_a_download_resumes_after_a_connection_breaks(server, tmp_path):
    server.breaks_after = [1000, 0, 70_000]  # the second connection transfers nothing, so the call gives up
    with pytest.raises(web.Unreachable, match="the connection ended after 1,000 of 256,000 bytes"):
        fetch(server, tmp_path / "file")
    assert names(tmp_path) == ["file.part"] and (tmp_path / "file.part").read_bytes() == CONTENT[:1000]
    fetch(server, tmp_path / "file")
    assert requested_ranges(server) == [None, "bytes=1000-", "bytes=1000-", "bytes=71000-"]
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]


def test_the_number_of_connections_is_bounded(server, tmp_path):
    server.breaks_after = [1] * 100
    with pytest.raises(web.Unreachable):
        fetch(server, tmp_path / "file")
    assert len(server.requests) == web.ATTEMPTS
    assert (tmp_path / "file.part").read_bytes() == CONTENT[: web.ATTEMPTS]


def test_a_server_without_ranges_sends_the_whole_file_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:5000])
    server.ranges = False
    fetch(server, tmp_path / "file")
    assert requested_ranges(server) == ["bytes=5000-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_complete_part_is_only_renamed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetch(server, tmp_path / "file")
    assert requested_ranges(server) == [f"bytes={len(CONTENT)}-"]
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]


@pytest.mark.parametrize("part", [b"something else", CONTENT + b"and more", bytes(len(CONTENT))])
def test_a_part_with_other_bytes_is_deleted_and_the_whole_file_downloaded(part, server, tmp_path):
    (tmp_path / "file.part").write_bytes(part)
    fetch(server, tmp_path / "file", limit=2 * len(CONTENT))
    assert requested_ranges(server) == [f"bytes={len(part)}-", None]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_contents_are_deleted_and_the_old_file_is_kept(server, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(InputError, match="not what it should be"):
        fetch(server, tmp_path / "file")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_file_above_the_limit_is_refused_before_it_is_written(server, tmp_path):
    with pytest.raises(InputError, match="is larger than 1,000 bytes, so it is not the expected file"):
        fetch(server, tmp_path / "file", limit=1000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status, reason", [(404, "Not Found"), (403, "Forbidden"), (500, "Internal Server Error")])
def test_an_error_of_the_server_is_quoted_without_a_retry(status, reason, server, tmp_path):
    server.status = status
    with pytest.raises(web.Unreachable, match=f"{server.url}/file: the server answers {status} {reason}") as caught:
        fetch(server, tmp_path / "file")
    assert len(server.requests) == 1 and names(tmp_path) == []
    assert caught.value.__cause__.closed  # an open socket would cause a ResourceWarning in the user's program


def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_refused_connection_is_reported(tmp_path):
    with pytest.raises(web.Unreachable, match=r"the connection failed \(.*refused"):
        web.fetch(f"http://127.0.0.1:{closed_port()}/file", tmp_path / "file", check, 1)
    assert names(tmp_path) == []


def test_a_server_that_sends_nothing_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(web.Unreachable, match=r"the connection failed \(timed out\)"):
            web.fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/file", tmp_path / "file", check, 1)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/file", "/etc/passwd", ""])
def test_only_http_and_https_are_accepted(url, tmp_path):
    with pytest.raises(InputError, match="is not an http or https address"):
        web.fetch(url, tmp_path / "file", check, 1)


@pytest.mark.parametrize("url", ["http://", "http://[bad/file", "http://a b/file", "http://127.0.0.1:x/file"])
def test_an_invalid_address_is_reported(url, tmp_path):
    with pytest.raises(web.Unreachable, match="the connection failed"):
        web.fetch(url, tmp_path / "file", check, 1)


def test_a_full_disk_is_not_reported_as_a_network_error(server, small_disk):
    server.content = bytes(600_000)
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(server, small_disk / "file", limit=10**6)
    assert not isinstance(caught.value, InputError) and len(server.requests) == 1
    assert names(small_disk) == ["file.part"]  # the download can be resumed from it


# --- The command imaml data ----------------------------------------------------------------------------------------


@pytest.fixture
def official(monkeypatch, server, fresh_cache):
    """The file names of Omniglot's archives, with CONTENT as their only valid contents and ``server`` as their URL."""
    monkeypatch.setattr(omniglot, "_verify", lambda archive, path, content: check(content))
    monkeypatch.setattr(omniglot, "URL", server.url)
    return [archive.file for archive in omniglot.ARCHIVES]


def test_the_command_downloads_both_archives_to_the_folder_that_training_reads(official, server, capsys):
    assert cli.main(["data", "omniglot"]) == 0
    folder = omniglot.default_directory()
    assert names(folder) == [*official, files.LOCK]
    assert [path for path, _ in server.requests] == [f"/{name}" for name in official]
    out = capsys.readouterr().out
    assert f"downloading {server.url}/{official[0]} …" in out
    assert out.endswith(f"omniglot is complete in {folder}; train on it: imaml train omniglot-5way-1shot-gd\n")


def test_both_splits_of_omniglot_have_the_same_downloaded_archives(official, server, capsys):
    assert cli.main(["data", "omniglot"]) == cli.main(["data", "omniglot-alphabets"]) == 0
    assert [path for path, _ in server.requests] == [f"/{name}" for name in official]  # the second download is empty
    command = "imaml train omniglot-5way-1shot-gd --dataset omniglot-alphabets\n"
    folder = omniglot.default_directory()
    assert capsys.readouterr().out.endswith(f"omniglot-alphabets is complete in {folder}; train on it: {command}")


def test_an_intact_archive_is_kept_and_a_damaged_one_is_downloaded(official, server, tmp_path, capsys):
    (tmp_path / official[0]).write_bytes(CONTENT)
    (tmp_path / official[1]).write_bytes(CONTENT[:100])
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path), "--url", f"{server.url}/mirror/"]) == 0
    assert server.requests == [(f"/mirror/{official[1]}", None)]
    out = capsys.readouterr().out
    assert f"{tmp_path / official[0]} is already there and intact" in out and out.endswith(f" --data {tmp_path}\n")


def test_without_a_network_the_command_names_the_files_to_copy_and_the_folder(official, tmp_path, capsys, monkeypatch):
    url = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setattr(omniglot, "URL", url)
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path / "new")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"imaml data: {url}/{official[0]}: the connection failed (")
    assert f"download {url}/{official[0]} and {url}/{official[1]} on another machine" in message
    assert message.endswith(f"and copy them to {tmp_path / 'new'}")
    assert names(tmp_path / "new") == [files.LOCK]


def test_a_mirror_with_wrong_data_is_refused(official, server, tmp_path, capsys):
    server.content = b"<!DOCTYPE html>"
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "imaml data: not what it should be\n"
    assert names(tmp_path) == [files.LOCK]


def test_a_second_download_to_the_same_folder_is_refused(official, tmp_path):
    with files.alone_in(tmp_path), pytest.raises(InputError, match="is in use by process"):
        omniglot.download(tmp_path)


def test_an_interrupted_download_keeps_its_part(official, server, tmp_path, capsys, monkeypatch):
    def interrupt(self, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr("imaml.runs.progress.Reporter.transfer", interrupt)
    assert cli.main(["data", "omniglot", "--dir", str(tmp_path)]) == 130
    part = tmp_path / f"{official[0]}.part"
    assert part.read_bytes() == CONTENT[: web.CHUNK]


@pytest.mark.slow("reads an official archive")
def test_an_official_archive_passes_the_checks_after_a_download(
    omniglot_directory: Path, tmp_path, server, fresh_cache
):
    archive = omniglot.ARCHIVES[1]
    server.content = (omniglot_directory / archive.file).read_bytes()
    server.breaks_after = [3_000_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniglot, "ARCHIVES", (archive,))
        omniglot.download(tmp_path, server.url)
    assert (tmp_path / archive.file).read_bytes() == server.content
    assert requested_ranges(server) == [None, "bytes=3000000-"]
