"""Archives as read-only trees of named files: a folder, or a zip file that is never unpacked."""

import contextlib
import functools
import hashlib
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sfkt_cli.console import warn
from sfkt_cli.data.decode import SUFFIXES
from sfkt_cli.errors import DataError, first_line

MAX_FILE_BYTES = 1 << 29  # larger single images are refused: 512 MB
MAX_RATIO = 400  # a zip entry that unpacks to more than so many times its size is taken for a bomb
BOMB_BYTES = 1 << 24  # entries below 16 MB are harmless whatever their ratio
MAX_FILES = 2_000_000
_UTF8_NAME = 0x800
_SYSTEM = (
    *("__macosx", "@eadir", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found"),
    "system volume information",
)


@dataclass(frozen=True)
class Container:
    """A folder or zip file; only the path is kept, so it can be sent to other processes."""

    path: Path  # the folder or the zip file
    prefix: str = ""  # folder inside it that names are relative to; "" or ending in ``/``

    def names(self) -> list[str]:
        """Names of all files, sorted, with ``/`` between folders, relative to the prefix."""
        cut = len(self.prefix)
        return sorted(n[cut:] for n in _index(self.path) if n.startswith(self.prefix))

    def describe(self, name: str) -> str:
        """How messages call a file."""
        inside = f"{self.prefix}{name}"
        return f"{self.path}:{inside}" if self.path.is_file() else str(self.path / inside)

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises DataError if it is missing, damaged or far too large."""
        inside = f"{self.prefix}{name}"
        try:
            if self.path.is_file():
                return _read_entry(self.path, inside)
            file = self.path / inside
            size = file.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(f"{file} has {size:,} bytes, more than an image can have")
            return file.read_bytes()
        except KeyError:
            raise DataError(f"{self.describe(name)} is missing") from None
        except DataError:
            raise
        except Exception as error:  # what zipfile and its codecs raise shares no base class
            raise DataError(f"{self.describe(name)} cannot be read: {first_line(error)}") from None

    def digest(self, names: Iterable[str], *, times: bool = True) -> str:
        """Hex SHA-256 of names, sizes and times of the files that an archive's samples are made of.

        In a folder others may come and go, such as notes or a run, and a copy has other ``times``.
        A zip file counts as a whole, by its names, sizes and checksums.
        """
        index: Mapping[str, str] = _index(self.path)
        if not self.path.is_file():
            listed = {f"{self.prefix}{name}" for name in names}
            index = {n: index[n] if times else index[n].partition(" ")[0] for n in listed}
        lines = (f"{name}\t{index[name]}" for name in sorted(index))
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def is_system(name: str) -> bool:
    """Whether a part of a path is hidden or a system's own: thumbnails, resource forks, bins."""
    return any(part[:1] == "." or part.casefold() in _SYSTEM for part in name.split("/"))


def list_files(folder: Path, *, quiet: bool = False) -> dict[str, str]:
    """All files below a folder, each with a text that changes when the file does.

    Names are relative to the folder, with ``/``; hidden and system files are left out, and so are
    files and folders that go while they are listed, and links that lead nowhere or in a circle.
    A warning counts images that are links without a file, unless ``quiet``.

    Raises:
        DataError: A folder cannot be read.
    """
    index: dict[str, str] = {}
    dangling: list[str] = []

    def visit(folder: Path, prefix: str, above: set[tuple[int, int]]) -> None:
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                return
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                name = prefix + entry.name
                if is_system(entry.name):
                    continue
                if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110 Path raises
                    if name.lower().endswith(SUFFIXES):
                        dangling.append(name)
                elif entry.is_dir():
                    visit(Path(entry.path), f"{name}/", above | {here})
                elif entry.is_file():
                    with contextlib.suppress(FileNotFoundError):  # gone, as a camera's files are
                        size = entry.stat()
                        index[name] = f"{size.st_size} {size.st_mtime_ns}"
                if len(index) > MAX_FILES:
                    raise DataError(
                        f"{folder} and its neighbours hold more than {MAX_FILES:,} files"
                    )
        except OSError as error:
            if not above or not isinstance(error, FileNotFoundError):
                raise DataError(f"{folder} cannot be read: {first_line(error)}") from None

    visit(folder, "", set())
    if dangling and not quiet:
        warn(
            f"{folder}: not read: {len(dangling)} links that lead nowhere, such as {dangling[0]}; "
            "fetch the files (`git annex get`, `dvc pull`), or remove the links"
        )
    return index


def tree_drawn_in(documentation: str | None) -> str:
    """The folders that the documentation of a reader draws, for messages."""
    lines = [line for line in (documentation or "").splitlines() if line.startswith("    ")]
    return "\n".join(["the folders are", *lines])


def open_container(
    root: Path,
    markers: tuple[str, ...],
    zips: tuple[str, ...],
    advice: str = "give the unpacked archive or its zip file with --root",
    is_sample: Callable[[str], object] = bool,
) -> Container:
    """Find an archive: ``root`` itself, a folder or zip file below it, or a folder inside of it.

    Args:
        root: Folder or zip file that the user gave.
        markers: Names of folders; one of them must lie at the archive's top. Empty: any top.
        zips: Names of the official zip files, looked for in ``root``.
        advice: What the message of an archive without markers tells to do.
        is_sample: Whether a file name is one of the archive's, which counts where there are no
            markers.

    Raises:
        DataError: Nothing of the kind is there.
    """
    if not root.exists():
        raise DataError(f"{root} does not exist: give the folder of the data with --root")
    candidates = [root]
    if root.is_dir():
        candidates += [root / name for name in zips if (root / name).is_file()]
    for candidate in candidates:
        if markers:
            tops = find_tops(_index(candidate), markers)
            if len(tops) > 1:
                raise DataError(
                    f"{candidate} holds {len(tops)} sets of data, in {tops[0]} and {tops[1]}: give "
                    f"one of them with --root, or put what lies below them together; {advice}"
                )
            top = tops[0] if tops else None
        else:
            top = "" if any(map(is_sample, _index(candidate))) else None
        if top is not None:
            return Container(candidate, top)
    top_names = sorted({name.partition("/")[0] for name in _index(root)})[:6]
    raise DataError(
        f"{root} holds no {' or '.join(markers) or 'samples'} "
        f"(it holds {', '.join(top_names) or 'nothing'}): {advice}"
    )


def forget_indexes() -> None:
    """Forget what archives hold: they may have changed since they were listed."""
    _index.cache_clear()
    _zip.cache_clear()


def find_tops(names: Iterable[str], markers: tuple[str, ...]) -> list[str]:
    """The highest folders that hold a marker, in any case: ``""`` or ending in ``/``."""
    tops = set()
    for name in names:
        folders = PurePosixPath(name).parts[:-1]
        for depth, folder in enumerate(folders[:4]):
            if folder.casefold() in markers:
                tops.add("".join(f"{part}/" for part in folders[:depth]))
    least = min((top.count("/") for top in tops), default=0)
    return sorted(top for top in tops if top.count("/") == least)


@functools.lru_cache(maxsize=4)
def _index(path: Path) -> Mapping[str, str]:
    return _index_zip(path) if path.is_file() else list_files(path)


def _index_zip(path: Path) -> Mapping[str, str]:
    index: dict[str, str] = {}
    guessed = []
    for info in _zip(path, os.getpid()).infolist():
        if info.is_dir():
            continue
        name = info.filename
        unmarked = not info.flag_bits & _UTF8_NAME and not name.isascii()
        if unmarked and info.orig_filename.endswith(name):  # else it was UTF-8
            guessed.append(name)
        parts = PurePosixPath(name).parts
        if "\\" in name:
            raise DataError(
                f"{path}: entry {name!r} has backslashes between its folders: unpack it and give "
                "the folder, or pack it with another program"
            )
        if not parts or name[0] == "/" or ".." in parts or re.match("[A-Za-z]:/", name):
            raise DataError(f"{path}: entry {name!r} points outside of the archive; refused")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{path}: entry {name!r} is a symbolic link; refused")
        if is_system(name):
            continue
        if name in index:
            raise DataError(f"{path}: two entries are named {name!r}")
        index[name] = f"{info.file_size} {info.CRC:08x}"
    if guessed:
        warn(
            f"{path}: the encoding of {len(guessed)} names is not known, such as {guessed[0]!r}: "
            "if they look wrong, pack the file again with names in UTF-8"
        )
    return index


def _read_entry(path: Path, name: str) -> bytes:
    archive = _zip(path, os.getpid())
    info = archive.getinfo(name)
    bomb = info.file_size > max(BOMB_BYTES, MAX_RATIO * info.compress_size)
    if info.file_size > MAX_FILE_BYTES or bomb:
        raise DataError(
            f"{path}:{name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, "
            "more than an image can have; refused"
        )
    return archive.read(info)


@functools.lru_cache(maxsize=2)
def _zip(path: Path, process: int) -> zipfile.ZipFile:
    """An open zip file; ``process`` keeps forked processes from sharing one file position."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise DataError(
            f"{path} is not an intact zip file: {first_line(error)}; only folders and zip files "
            "are read, so unpack archives of other kinds"
        ) from None
    for info in archive.infolist():
        if not info.is_dir():  # "./a.png", as bsdtar writes it, is "a.png"
            info.filename = info.filename.removeprefix("./")
        if not info.flag_bits & _UTF8_NAME and not info.filename.isascii():
            with contextlib.suppress(UnicodeError):  # macOS writes UTF-8 without saying so
                info.filename = info.filename.encode("cp437").decode()
        archive.NameToInfo[info.filename] = info
    return archive
