"""Fetching the archives that have a public address.

One file at a time into ``NAME.part``; an interrupted download goes on where it stopped, and the
file gets its name once its size and checksum are right. The licence notice comes first: nothing is
fetched before the user has accepted it.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sfkt_cli.console import say, track, warn
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.files import sync_folder

PART = ".part"
BLOCK = 1 << 20
ATTEMPTS = 5
TIMEOUT_S = 60.0
SPARE_BYTES = 1 << 28
"""Left free on the disk beside the file: 256 MB."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch.

    Attributes:
        url: Its address.
        name: Its name in the folder.
        size: In bytes; 0: not known.
        md5: Hex checksum; "": none is published.
        sha256: Hex checksum; "": none is published.
    """

    url: str
    name: str
    size: int = 0
    md5: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        licence: What its authors ask for.
        files: What is fetched.
    """

    licence: str
    files: tuple[RemoteFile, ...]


SOURCES: dict[str, Source] = {
    "nyu-depth": Source(
        "NYU Depth v2 (Silberman, Hoiem, Kohli, Fergus, ECCV 2012): no licence is stated; its page "
        "asks users to cite the paper. Take it for research only.",
        (
            RemoteFile(
                "http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
                "nyu_depth_v2_labeled.mat",
                2_972_037_809,
                "520609c519fba3ba5ac58c8fefcc3530",
            ),
            RemoteFile(
                "https://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat",
                "splits.mat",
                md5="08e3c3aea27130ac7c01ffd739a4535f",
            ),
        ),
    ),
    "sun-rgbd": Source(
        "SUN RGB-D (Song, Lichtenberg, Xiao, CVPR 2015): no licence is stated; its page asks users "
        "to cite the paper and those of NYU Depth v2, B3DO and SUN3D. Take it for research only.",
        (
            RemoteFile(
                "https://rgbd.cs.princeton.edu/data/SUNRGBD.zip",
                "SUNRGBD.zip",
                md5="59a6919f60ecd6acb1c9a850fcb543b8",
            ),
        ),
    ),
    "rgb-nir": Source(
        "EPFL RGB-NIR Scene (Brown and Susstrunk, CVPR 2011): no licence is stated; its page asks "
        "users to cite the paper. Take it for research only.",
        (
            RemoteFile(
                "https://ivrlwww.epfl.ch/supplementary_material/cvpr11/nirscene1.zip",
                "nirscene1.zip",
                952_431_486,
            ),
        ),
    ),
}


def download(dataset: str, folder: Path, accepted: Callable[[], bool]) -> Path:
    """Fetch the archive of a data set.

    Args:
        dataset: Name as in ``sfkt prepare NAME``.
        folder: Where the files go.
        accepted: Whether the user accepts the notice, which has been shown when this is asked.

    Returns:
        The folder, for ``prepare.root``.

    Raises:
        ConfigError: The data set has no public address, or the notice is not accepted.
        DataError: No connection, no space, or a file is not what it should be.
    """
    missing = missing_files(dataset, folder)
    if not missing:
        say(f"download: {folder} is complete already")
        return folder
    say(SOURCES[dataset].licence)
    if not accepted():
        raise ConfigError(f"{dataset}: to accept this notice, add --accept-licence")
    for file in missing:
        fetch(file, folder)
    return folder


def missing_files(dataset: str, folder: Path) -> list[RemoteFile]:
    """Files of the archive that are not in the folder yet.

    Raises:
        ConfigError: The data set has no public address.
    """
    if dataset not in SOURCES:
        raise ConfigError(
            f"{dataset} cannot be fetched: only {', '.join(SOURCES)} have a public address; "
            "docs/datasets.md says where to get it"
        )
    return [file for file in SOURCES[dataset].files if not (folder / file.name).is_file()]


def fetch(file: RemoteFile, folder: Path, *, pause_s: float = 2.0) -> Path:
    """Fetch one file, going on with what an interrupted download left.

    Args:
        file: What to fetch.
        folder: Where it goes.
        pause_s: Before the second attempt, in seconds; it doubles from one to the next.

    Raises:
        DataError: No connection, no space, or the file is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}{PART}"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch_rest(file, part)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise DataError(f"{file.url} answers {error.code} {error.reason}") from None
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", "") or error)
        if attempt == ATTEMPTS:
            raise DataError(
                f"{file.url} cannot be fetched ({reason}): run the same command again to go on, "
                f"or put the file into {folder} yourself"
            )
        warn(f"{file.name}: {reason}; trying again")
        time.sleep(pause_s * 2 ** (attempt - 1))
    _check(file, part)
    path = folder / file.name
    part.replace(path)
    sync_folder(folder)
    return path


def _fetch_rest(file: RemoteFile, part: Path) -> None:
    """Fetch what is not there yet; a server without ranges sends everything again."""
    have = part.stat().st_size if part.is_file() else 0
    if file.size and have == file.size:
        return
    request = urllib.request.Request(file.url, headers={"User-Agent": "sfkt"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        length = int(answer.headers.get("Content-Length") or 0)
        if have and answer.status != 206:
            have = 0
        total = have + length or file.size
        if file.size and length and total != file.size:
            raise DataError(
                f"{file.url} has {total:,} bytes, expected {file.size:,}: it is another file"
            )
        _check_space(part, total - have)
        received = have
        with (
            track(file.name, max(total, 1), "bytes") as tracker,
            part.open("r+b" if have else "wb") as output,
        ):
            output.seek(have)
            while block := answer.read(BLOCK):
                _keep(output, block, part)
                received += len(block)
                tracker.advance(len(block), len(block))
    if length and received != total:
        raise http.client.IncompleteRead(b"", total - received)


def _keep(output: BinaryIO, block: bytes, part: Path) -> None:
    try:
        output.write(block)
        output.flush()
    except OSError as error:
        raise DataError(f"{part} cannot be written: {error.strerror or error}") from None


def _check(file: RemoteFile, part: Path) -> None:
    for kind, expected in (("md5", file.md5), ("sha256", file.sha256)):
        if not expected:
            continue
        with part.open("rb") as content:
            found = hashlib.file_digest(content, kind).hexdigest()
        if found != expected:
            part.unlink()
            raise DataError(
                f"{file.url}: {kind} is {found}, expected {expected}: what came was damaged or is "
                "another file, and was deleted; run the same command again"
            )
    if not file.md5 and not file.sha256:
        say(f"{file.name}: no checksum is published, only its size was compared")


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed + SPARE_BYTES > free:
        raise DataError(
            f"{part.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: "
            "make room, or give another folder with --root"
        )
