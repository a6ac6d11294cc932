"""Downloads from a server on this machine: ranges, interruptions, wrong checksums, no space."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfkt_cli.data import download as module
from sfkt_cli.data.download import RemoteFile, download, fetch, missing_files
from sfkt_cli.errors import ConfigError, DataError, RunError
from sfkt_cli.files import locking

CONTENT = bytes(range(256)) * 4000


class Behaviour:
    """What the server does, and what it was asked."""

    def __init__(self) -> None:
        self.ranges = True
        self.tells_size = True
        self.break_after: list[int] = []
        self.asked: list[str] = []
        self.status = 200


@pytest.fixture
def server() -> Iterator[tuple[str, Behaviour]]:
    behaviour = Behaviour()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            behaviour.asked.append(wanted)
            first = int(wanted[6:-1]) if wanted and behaviour.ranges else 0
            if behaviour.status != 200:
                self.send_error(behaviour.status)
                return
            if first >= len(CONTENT):
                self.send_response(416)
                if behaviour.tells_size:
                    self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
                self.end_headers()
                return
            rest = CONTENT[first:]
            self.send_response(206 if first else 200)
            if behaviour.tells_size:
                self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if behaviour.break_after:
                rest = rest[: behaviour.break_after.pop(0)]
            with contextlib.suppress(BrokenPipeError):  # the client may have all that it wants
                self.wfile.write(rest)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/archive.zip", behaviour
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def remote(url: str, **known: Any) -> RemoteFile:
    return RemoteFile(url, **known)


def test_file_arrives_whole_and_nothing_else_is_left(
    server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    known = {"size": len(CONTENT), "checksum": f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"}
    path = fetch(remote(server[0], **known), tmp_path)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["archive.zip"]


def test_two_downloads_into_one_folder_do_not_mix(
    server: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = remote(server[0], size=len(CONTENT))
    monkeypatch.setitem(module.SOURCES, "rgb-nir", (file,))
    path = tmp_path / "new" / "archive.zip"
    path.parent.mkdir()
    with locking(path.with_name(".download.lock"), ""), pytest.raises(RunError, match="another"):
        download("rgb-nir", path.parent, lambda: True)
    path.write_bytes(CONTENT + b"of another process")
    download("rgb-nir", path.parent, lambda: True)
    assert path.read_bytes() == CONTENT
    assert not missing_files("rgb-nir", path.parent)


def test_an_archive_that_was_unpacked_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "nirscene1").mkdir()
    assert missing_files("rgb-nir", tmp_path)
    (tmp_path / "nirscene1/country").mkdir()
    assert not missing_files("rgb-nir", tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("tells_size", [True, False])
def test_broken_connections_are_taken_up_again(
    server: tuple[str, Behaviour], tmp_path: Path, ranges: bool, tells_size: bool
) -> None:
    url, behaviour = server
    behaviour.ranges, behaviour.tells_size = ranges, tells_size
    behaviour.break_after = [300_000, 200_000]
    size = 0 if tells_size else len(CONTENT)
    path = fetch(remote(url, size=size), tmp_path, pause_s=0)
    assert path.read_bytes() == CONTENT
    assert behaviour.asked[1] == "bytes=300000-"


def test_next_run_goes_on_where_the_last_one_was_killed(
    server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    (tmp_path / "archive.zip.part").write_bytes(CONTENT[:500_000])
    path = fetch(remote(server[0]), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server[1].asked == ["bytes=500000-"]


def test_remainder_longer_than_the_file_is_thrown_away(
    server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    (tmp_path / "archive.zip.part").write_bytes(CONTENT + b"more")
    path = fetch(remote(server[0]), tmp_path, pause_s=0)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("tells_size", [True, False])
def test_a_download_that_was_complete_is_not_fetched_again(
    server: tuple[str, Behaviour], tmp_path: Path, tells_size: bool
) -> None:
    url, behaviour = server
    behaviour.tells_size = tells_size
    (tmp_path / "archive.zip.part").write_bytes(CONTENT)
    checksum = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    assert fetch(remote(url, checksum=checksum), tmp_path, pause_s=0).read_bytes() == CONTENT
    again = [] if tells_size else [""]
    assert behaviour.asked == [f"bytes={len(CONTENT)}-", *again]


def test_wrong_checksum_names_the_address_and_leaves_nothing(
    server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"archive\.zip: md5 is .* expected 00"):
        fetch(remote(server[0], checksum="md5:00"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_size_is_refused_before_anything_is_fetched(
    server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="another file"):
        fetch(remote(server[0], size=5), tmp_path)


def test_full_disk_is_told_before_anything_is_fetched(
    server: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="GB are needed"):
        fetch(remote(server[0]), tmp_path)


def test_a_file_that_cannot_be_written_is_not_tried_again(
    server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    (tmp_path / "archive.zip.part").mkdir()
    with pytest.raises(DataError, match=r"archive\.zip\.part cannot be written"):
        fetch(remote(server[0]), tmp_path)
    assert len(server[1].asked) == 1


@pytest.mark.parametrize("status", [404, 503])
def test_server_errors_end_in_a_message(
    server: tuple[str, Behaviour], tmp_path: Path, status: int
) -> None:
    server[1].status = status
    with pytest.raises(DataError, match=str(status)):
        fetch(remote(server[0]), tmp_path, pause_s=0)


def test_nothing_is_fetched_before_the_notice_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--accept-licence"):
        download("rgb-nir", tmp_path, lambda: False)
    assert not list(tmp_path.iterdir())


def test_data_set_without_address_says_so(tmp_path: Path) -> None:
    (tmp_path / "there.zip").touch()
    with pytest.raises(ConfigError, match=r"there\.zip is a file, and --download fetches into"):
        download("nyu-depth", tmp_path / "there.zip", lambda: True)
    with pytest.raises(ConfigError, match="diml-rgbd cannot be fetched"):
        download("diml-rgbd", tmp_path, lambda: True)
