"""Fetching the archives that have a public address.

A file goes into ``NAME.part`` and gets its name once its size and checksum are right; an
interrupted download continues where it stopped. Nothing is fetched before the user has accepted the
notice about the licence.
"""

import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfkt_cli.console import say, track, warn
from sfkt_cli.errors import ConfigError, DataError, first_line
from sfkt_cli.files import locking, sync_folder

BLOCK = 1 << 20
ATTEMPTS = 5
TIMEOUT_S = 60.0
SPARE_BYTES = 1 << 28  # left free on the disk beside the file: 256 MB


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch."""

    url: str  # its address, which ends with its name
    size: int = 0  # in bytes; 0: not known
    checksum: str = ""  # such as ``md5:1f3a...`` or ``sha256:9c05...``; "": none is published

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return self.url.rpartition("/")[2]


SOURCES = {
    "nyu-depth": (
        RemoteFile(
            "http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
            2_972_037_809, "md5:520609c519fba3ba5ac58c8fefcc3530",
        ),
        RemoteFile(
            "https://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat",
            checksum="md5:08e3c3aea27130ac7c01ffd739a4535f",
        ),
    ),
    "sun-rgbd": (
        RemoteFile(
            "https://rgbd.cs.princeton.edu/data/SUNRGBD.zip",
            checksum="md5:59a6919f60ecd6acb1c9a850fcb543b8",
        ),
    ),
    "rgb-nir": (
        RemoteFile(
            "https://ivrlwww.epfl.ch/supplementary_material/cvpr11/nirscene1.zip", 952_431_486
        ),
    ),
}  # fmt: skip
"""Files of each data set that has a public address."""
PAGES = {
    "diml-rgbd": "https://dimlrgbd.github.io/",
    "washington-rgbd": "https://rgbd-dataset.cs.washington.edu/",
}
"""Where people get the other archives."""
CITE = {
    "nyu-depth": "NYU Depth v2 (Silberman, Hoiem, Kohli, Fergus, ECCV 2012)",
    "sun-rgbd": "SUN RGB-D (Song, Lichtenberg, Xiao, CVPR 2015) and those of NYU Depth v2, B3DO "
    "and SUN3D",
    "rgb-nir": "EPFL RGB-NIR Scene (Brown and Susstrunk, CVPR 2011)",
}
"""The papers that the authors of each ask users to cite; none of them states a licence."""


def download(dataset: str, folder: Path, accepted: Callable[[], bool]) -> None:
    """Fetch the archive of a data set.

    ``accepted`` is asked once the notice has been shown.

    Raises:
        ConfigError: The data set has no public address, or the notice is not accepted.
        DataError: No connection, no space, or a file is not what it should be.
        RunError: Another process fetches into the folder.
    """
    missing = missing_files(dataset, folder)
    if not missing:
        say(f"download: {folder} is complete already")
        return
    say(
        f"{dataset}: no licence is stated; its page asks users to cite the paper of "
        f"{CITE[dataset]}. Use it for research only."
    )
    if not accepted():
        raise ConfigError(f"{dataset}: to accept this notice, add --accept-licence")
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another sfkt process fetches into {folder}: wait for it to end"
    with locking(folder / ".download.lock", busy):
        for file in missing_files(dataset, folder):
            fetch(file, folder)


def missing_files(dataset: str, folder: Path) -> list[RemoteFile]:
    """Files that are not in the folder yet; raises ConfigError if they have no address.

    A zip file that was unpacked there and deleted is not missing; one of another size is.
    """
    if dataset not in SOURCES:
        raise ConfigError(
            f"{dataset} cannot be fetched: only {', '.join(SOURCES)} have a public address"
            + (f"; {PAGES[dataset]} says how to get it" if dataset in PAGES else "")
        )
    if folder.is_file():
        raise ConfigError(
            f"--root {folder} is a file, and --download fetches into a folder: leave one out"
        )
    return [file for file in SOURCES[dataset] if not _is_there(file, folder / file.name)]


def _is_there(file: RemoteFile, path: Path) -> bool:
    if path.is_file():
        return file.size in (0, path.stat().st_size)
    return path.suffix == ".zip" and any(path.with_suffix("").glob("*"))


def fetch(file: RemoteFile, folder: Path, *, pause_s: float = 2.0) -> Path:
    """Fetch one file into a folder, going on with what an interrupted download left.

    The pause before the second attempt, in seconds, doubles from one attempt to the next.

    Raises:
        DataError: No connection, no space, or the file is not what it should be.
    """
    part = folder / f"{file.name}.part"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch_rest(file, part)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # all is there, or more than the file has
                size = part.stat().st_size if part.is_file() else 0
                if error.headers.get("Content-Range") == f"bytes */{size}":
                    break
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise DataError(f"{file.url} answers {error.code} {error.reason}") from None
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "filename", None):  # of the file system, not of the network
                raise DataError(f"{part} cannot be written: {first_line(error)}") from None
            reason = str(getattr(error, "reason", "") or error)
        if attempt == ATTEMPTS:
            raise DataError(
                f"{file.url} cannot be fetched ({reason}): run the same command again to continue, "
                f"or put the file into {folder} yourself"
            )
        warn(f"{file.name}: {reason}; trying again")
        time.sleep(pause_s * 2 ** (attempt - 1))
    _check(file, part)
    part.replace(folder / file.name)
    sync_folder(folder)
    return folder / file.name


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
        total = have + length if length else file.size
        if file.size and total != file.size:
            raise DataError(
                f"{file.url} has {total:,} bytes, expected {file.size:,}: it is another file"
            )
        free = shutil.disk_usage(part.parent).free
        if total - have + SPARE_BYTES > free:
            raise DataError(
                f"{part.parent} has {free / 1e9:.1f} GB free, {(total - have) / 1e9:.1f} GB are "
                "needed: make room, or give another folder with --root"
            )
        with (
            track(file.name, max(total, 1), "bytes", done=have) as tracker,
            part.open("ab" if have else "wb", buffering=0) as output,
        ):
            while block := answer.read(BLOCK):
                try:
                    if output.write(block) < len(block):
                        raise OSError("the disk is full")
                except OSError as error:
                    raise DataError(f"{part} cannot be written: {first_line(error)}") from None
                tracker.advance(len(block), len(block))
    if total and part.stat().st_size != total:
        raise http.client.IncompleteRead(b"", total - part.stat().st_size)


def _check(file: RemoteFile, part: Path) -> None:
    if not file.checksum:
        say(f"{file.name}: no checksum is published, only its size was compared")
        return
    kind, _, expected = file.checksum.partition(":")
    with part.open("rb") as content:
        actual = hashlib.file_digest(content, kind).hexdigest()
    if actual != expected:
        part.unlink()
        raise DataError(
            f"{file.url}: {kind} is {actual}, expected {expected}: the download is damaged or "
            "another file, and was deleted; run the same command again"
        )
