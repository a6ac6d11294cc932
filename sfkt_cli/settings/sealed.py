"""Records (JSON) and settings (YAML) of a run: sealed when written, checked when read.

A record is one JSON object. Its entry ``record_sha256`` is the checksum of all others. The settings
of a stage begin with a line that holds the checksum of what follows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sfkt_cli.errors import DataError
from sfkt_cli.files import sha256_json, write_json, write_text

SEAL = "record_sha256"
_HEAD = "# sha256 of what follows: {}"
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write a record with its checksum; it appears whole. NaN is refused."""
    plain = json.loads(json.dumps({key: values[key] for key in values if key != SEAL}))
    write_json(path, {**plain, SEAL: sha256_json(plain)})


def read_record(path: Path, kind: type[AnyRecord], *, sealed: bool = True) -> AnyRecord:
    """Read a record that :func:`write_record` wrote.

    One that is not ``sealed`` has its checksum in another record (``outputs`` of a done.json).

    Raises:
        DataError: It is missing, damaged, without a checksum, or not of this kind.
    """
    try:
        values = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
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
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def write_settings(path: Path, text: str) -> None:
    """Write YAML with its checksum in the first line; it appears whole."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(path, f"{_HEAD.format(digest)}\n{text}")


def read_settings(path: Path) -> dict[str, Any]:
    """Read what :func:`write_settings` wrote; a DataError: missing, damaged, edited."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        if head.decode() != _HEAD.format(hashlib.sha256(body).hexdigest()):
            raise ValueError("it does not match its checksum")
        values = yaml.safe_load(body.decode())
        if not isinstance(values, dict):
            raise ValueError("it holds no settings")
        return values
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, error) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _damaged(path: Path, why: object) -> DataError:
    if isinstance(why, OSError):
        why = why.strerror or why
    return DataError(
        f"{path} is damaged or was edited ({why}): restore it, or make it again with --force"
    )
