"""Files that appear whole or not at all: temporary name, fsync, rename, fsync of the folder.

Records (JSON) and settings (YAML) are sealed when written and checked when read. A record is one
JSON object, whose entry ``record_sha256`` is the checksum of all others. The settings of a stage
begin with a line that holds the checksum of what follows.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sfkt_cli.errors import DataError, RunError

PARTIAL = ".partial"
SEAL = "record_sha256"
_HEAD = "# sha256 of what follows: {}"
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


class Busy(RunError):
    """Another process holds the lock."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes the name when the block ends well.

    The folder of ``path`` is made where it is missing, but none above it: a run folder that was
    moved while a stage runs must not come back at its old place. A device or a pipe, such as
    /dev/null, is written to and stays; of a link, the file that it leads to is replaced.

    Raises:
        OSError: From the file system, such as a full disk; ``path`` is then what it was.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def at_home(value: Any) -> Any:
    """A path whose ``~`` is the home folder: shells leave that of --run=~/a to us.

    Other values, and the name of a user that there is not, stay as they are.
    """
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value  # noqa: PTH111


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locking(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a file, which is made, or of a folder that is there.

    It is free again when the block or the process ends. Network file systems lock files alone:
    there, a folder is not locked.

    Raises:
        Busy: Another process holds it; the message is ``busy``.
        RunError: Nothing can be locked here.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(busy) from None
        except OSError as error:
            error.filename = str(path)
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):
                raise
            if not path.is_dir():
                raise RunError(
                    f"{path} cannot be locked ({error.strerror}): this file system has no locks; "
                    "mount it with locks, or choose a folder on a local disk"
                ) from None
        yield
    finally:
        with contextlib.suppress(OSError):  # a forked process may still have the descriptor
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; bytes of file names that are not UTF-8 are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path) -> bytes:
    """The content of a file that a stage wrote.

    Raises:
        DataError: It is missing.
        OSError: The file system refuses it, for a moment perhaps; names it.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is missing: restore it, or make it again with --force") from None
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def require_file(path: Path, setting: str) -> None:
    """Raise a DataError that names the setting if ``path`` is missing, a pipe or a folder."""
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise DataError(f"{setting}: {path} {problem}")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sweep_partials(folder: Path) -> None:
    """Delete what killed writers left in a folder and below."""
    for stray in folder.rglob(f".*{PARTIAL}"):
        stray.unlink(missing_ok=True)


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write a record with its checksum; it appears whole. NaN is refused."""
    plain = json.loads(json.dumps({key: values[key] for key in values if key != SEAL}))
    write_json(path, {**plain, SEAL: sha256_json(plain)})


def read_record(path: Path, kind: type[AnyRecord], *, sealed: bool = True) -> AnyRecord:
    """Read a record that :func:`write_record` wrote.

    One that is not ``sealed`` has its checksum in another record (``outputs`` of a done.json).

    Raises:
        DataError: It is missing, damaged, without a checksum, or not of this kind.
        OSError: As of :func:`read_bytes`.
    """
    content = read_bytes(path)
    try:
        values = json.loads(content, parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        seal = values.pop(SEAL, None)
        if sealed and seal is None:
            raise DataError(
                f"{path} has no {SEAL}: another version wrote it, or it was edited: make it again "
                "with --force"
            )
        if sealed and seal != sha256_json(values):
            raise ValueError("it does not match its checksum")
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def write_settings(path: Path, text: str) -> None:
    """Write YAML with its checksum in the first line; it appears whole."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(path, f"{_HEAD.format(digest)}\n{text}")


def read_settings(path: Path) -> dict[str, Any]:
    """Read what :func:`write_settings` wrote; raises as :func:`read_record` does."""
    head, _, body = read_bytes(path).partition(b"\n")
    try:
        if head.decode() != _HEAD.format(hashlib.sha256(body).hexdigest()):
            raise ValueError("it does not match its checksum")
        values = yaml.safe_load(body.decode())
        if not isinstance(values, dict):
            raise ValueError("it holds no settings")
        return values
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, error) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _damaged(path: Path, why: object) -> DataError:
    return DataError(
        f"{path} is damaged or was edited ({why}): restore it, or make it again with --force"
    )
