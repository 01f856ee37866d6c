"""Stage 1's download, from a web server of the test's own: resumed, restarted, refused."""

import http.server
import re
import threading
from pathlib import Path

import pytest
from tiny_cifar import (
    assert_tiny,
    load,
    md5,
    refused,
    tiny_batches,
    write_archive,
)

ARCHIVE = "cifar-10-python.tar.gz"


class Page(http.server.BaseHTTPRequestHandler):
    """The server's `content`; honours Range if `ranges`, hangs up after `cut` bytes."""

    def do_GET(self):  # noqa: N802
        server, asked = self.server, self.headers.get("Range", "")
        server.asked.append(asked)
        wanted = re.fullmatch(r"bytes=(\d+)-", asked)
        first = int(wanted[1]) if wanted and server.ranges else 0
        if first >= len(server.content):
            return self.send_error(416 if first else 404)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(server.content) - first))
        self.end_headers()
        self.wfile.write(server.content[first:][: server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A web server with the tiny archive, and the options that download from it."""
    monkeypatch.setenv("no_proxy", "*")
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.content, server.ranges, server.cut, server.asked = archive.read_bytes(), True, None, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    (tmp_path / "downloads").mkdir()
    yield (
        server,
        {
            "url": f"http://127.0.0.1:{server.server_port}/{ARCHIVE}",
            "md5": md5(archive),
            "downloads": tmp_path / "downloads",
        },
    )
    server.shutdown()
    thread.join()
    server.server_close()


def part_of(options: dict) -> Path:
    return options["downloads"] / f"{ARCHIVE}.part"


def test_download_once_and_reuse(tmp_path, served):
    server, options = served
    assert_tiny(load(tmp_path / "first", **options))
    assert_tiny(load(tmp_path / "second", **options))
    assert server.asked == [""]
    assert [path.name for path in options["downloads"].iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("came", [5000, None])
def test_a_part_is_finished_with_or_without_range_support(tmp_path, served, ranges, came):
    server, options = served
    server.ranges = ranges
    part_of(options).write_bytes(server.content[:came])  # None: all of it
    assert_tiny(load(tmp_path / "out", **options))
    assert server.asked == [f"bytes={came or len(server.content)}-"]
    assert [path.name for path in options["downloads"].iterdir()] == [ARCHIVE]


def test_resuming_fetches_only_the_rest(tmp_path, served):
    server, options = served
    part_of(options).write_bytes(server.content[:5000])
    server.content = bytes(5000) + server.content[5000:]  # its start must not be needed
    assert_tiny(load(tmp_path / "out", **options))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_keeps_what_came(tmp_path, served, ranges):
    server, options = served
    server.ranges, server.cut = ranges, 7000
    refused("connection closed after 7000 of .* continues it, --source PATH", tmp_path, **options)
    assert part_of(options).read_bytes() == server.content[:7000]
    server.cut = None
    assert_tiny(load(tmp_path / "out", **options))
    assert server.asked == ["", "bytes=7000-"]


def test_a_wrong_part_is_deleted_and_started_afresh(tmp_path, served):
    server, options = served
    part_of(options).write_bytes(bytes(5000))
    refused(f"expected MD5 {options['md5']}, found .*; deleted", tmp_path, **options)
    assert list(options["downloads"].iterdir()) == []
    assert_tiny(load(tmp_path / "out", **options))
    assert server.asked == ["bytes=5000-", ""]


def test_a_damaged_archive_is_fetched_again(tmp_path, served):
    server, options = served
    (options["downloads"] / ARCHIVE).write_bytes(server.content[:-1])
    assert_tiny(load(tmp_path / "out", **options))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "nonsense", "file:///nowhere"])
def test_no_network_is_one_line_and_keeps_the_part(tmp_path, served, url):
    _, options = served
    part_of(options).write_bytes(b"what came before")
    options["url"] = url
    refused(f"download of {url} failed .* continues it, --source PATH", tmp_path, **options)
    assert part_of(options).read_bytes() == b"what came before"


def test_a_page_that_is_gone_is_one_line(tmp_path, served):
    server, options = served
    server.content = b""
    refused(f"download of {options['url']} failed .*404", tmp_path, **options)
