"""What a reader hands over: the list of an archive's samples, and a way to load each of them."""

import functools
import hashlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.archive import Container
from sfkt_cli.data.decode import decode_rgb
from sfkt_cli.data.grid import fit_rgb
from sfkt_cli.data.sensor import Sensor, sensor_of_config
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

TR_PARTS = ("source", "target", "test")
PARTS = (*TR_PARTS, "ti")
"""Where a sample may go: RGB for the source model, unlabelled target images, held out, pairs."""
MAX_ID_BYTES = 96  # ids become file names, which may have 255 bytes with all that is added
_NO_TEXT = re.compile("[\udc80-\udcff]")  # what stands for bytes that are not UTF-8
nfc = functools.partial(unicodedata.normalize, "NFC")  # names are compared so, whoever wrote them
Capture = TypeVar("Capture", bound=Hashable)


@dataclass(frozen=True)
class Record:
    """One sample: an RGB image, a target image, or a pair of both; nothing is decoded yet."""

    id: str  # unique in the archive; :func:`settle_ids` makes a file name of it
    # Scene, place, capture or subject, of which source, target and test share none; "": its own.
    group: str
    label: str | None  # class name; None where nobody knows it
    rgb: str | None  # name of the RGB image in the archive; None where there is none
    target: str | None  # name of the target image in the archive
    # Where the archive allows it to go; empty: anywhere its class and images allow. A pair without
    # a label becomes a TR target image unless this is ``("ti",)``.
    parts: tuple[str, ...] = ()


class Loader(Protocol):
    """Loads the images of a record, or raises a DataError; picklable, for other processes."""

    @property
    def sensor(self) -> Sensor:
        """What the values of target images mean; S below is its ``image_size``."""

    def rgb(self, record: Record) -> NDArray[np.uint8]:
        """RGB (S, S, 3), resampled."""

    def target(self, record: Record) -> NDArray[Any]:
        """Target image (S, S) or (S, S, C) in the sensor's stored unit, resampled."""


@dataclass(frozen=True)
class FileLoader:
    """Decodes, converts and resamples image files."""

    container: Container
    sensor: Sensor

    def rgb(self, record: Record) -> NDArray[np.uint8]:
        """See :class:`Loader`."""
        size = self.sensor.image_size
        return fit_rgb(self.picture(record.rgb or "", size), size, self.sensor.fit)

    def target(self, record: Record) -> NDArray[Any]:
        """See :class:`Loader`."""
        return self.sensor.to_size(self.target_values(record.target or ""))

    def picture(self, name: str, size: int = 0) -> Image.Image:
        """An RGB image; a JPEG possibly at a fraction of its size, as in :func:`decode_rgb`."""
        content, place = self.container.read(name), self.container.describe(name)
        return decode_rgb(content, place, size, self.sensor.max_pixels)

    def target_values(self, name: str) -> NDArray[Any]:
        """A target image in the store's unit, at its own resolution."""
        return self.sensor.convert(self.decode(name), self.container.describe(name))

    def decode(self, name: str) -> NDArray[Any]:
        """A target image as it is in its file, but for values that stand for no reading."""
        return self.sensor.values_of(self.container.read(name), self.container.describe(name))


@dataclass(frozen=True)
class Archive:
    """An archive as a reader sees it."""

    records: tuple[Record, ...]  # of all samples
    loader: Loader  # loads their images
    digest: str  # names the archive's content, from names, sizes, and times or checksums of files
    digest_without_times: str = ""  # as all copies have it; "": ``digest`` has no times
    # Classes recognised by default; empty: all that are not ``usual_ti``.
    usual_tr: tuple[str, ...] = ()
    usual_ti: tuple[str, ...] = ()  # task-irrelevant classes by default; empty: all that are not TR
    registered: bool = True  # whether the images of a pair are aligned
    # Differences from the published counts and the like, to be shown as warnings.
    notes: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()  # what the reader found out and the user should know


def image_names(records: Iterable[Record]) -> list[str]:
    """Names of the images that records are made of."""
    return [name for record in records for name in (record.rgb, record.target) if name is not None]


def archive_of_files(
    config: Config,
    container: Container,
    records: Sequence[Record],
    *,
    loader: type[FileLoader] = FileLoader,
    more: Iterable[str] = (),
    modality: str = "depth",
    dtype: str = "uint16",
    **about: Any,
) -> Archive:
    """The archive of samples that are image files, target images of one channel.

    ``more`` are other files that its digest is to name, ``about`` further fields of the archive.
    """
    sensor = sensor_of_config(config, modality=modality, dtype=dtype, channels=1)
    names = [*image_names(records), *more]
    return Archive(
        tuple(records),
        loader(container, sensor),
        container.digest(names),
        container.digest(names, times=False),
        **about,
    )


def settle_ids(records: Iterable[Record], where: object) -> tuple[Record, ...]:
    """Sort records by id, which becomes a file name; a record without a group becomes its own.

    ``/`` becomes ``-``, and what else is unsafe ``_``. A short hash follows where that loses
    something: after other changes, and where two paths would have one id: ``a/b-c``, ``a-b/c``.
    Records of one id are told apart by the names of their files and the parts they may go to. Those
    that share an image, such as one RGB image beside two sensors, share a group, also by way of
    other records.

    Raises:
        DataError: A record is given twice, or a file's name is not UTF-8; the message names the
            file.
    """
    named = list(records)
    for whole in (False, True):
        alike = Counter(record.id for record in named)
        named = [replace(r, id=_name(r, whole)) if alike[r.id] > 1 else r for r in named]
    ordered = sorted(named, key=lambda record: record.id)
    for name in image_names(ordered):
        if _NO_TEXT.search(name):
            raise DataError(
                f"{where}: the file name {name!r} is not UTF-8: rename it; "
                "`convmv -r -f latin1 -t utf-8 --notest DIR` renames all"
            )
    for before, record in itertools.pairwise(ordered):
        if before.id == record.id:
            raise DataError(f"{where}: {record.id} is listed twice: remove one of the lines")
    ids = {record.id: _safe(record.id) for record in ordered}
    counts = Counter(ids.values())
    for path, safe in ids.items():
        if safe != path.replace("/", "-") or counts[safe] > 1:
            digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
            ids[path] = f"{safe}-{digest[:6]}"
    groups: dict[str, str] = {}  # the first group of each image
    joined: dict[str, str] = {}  # by group: another one, which shares an image with it

    def united(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    for record in sorted(ordered, key=lambda record: not record.group):
        group = record.group or ids[record.id]
        for name in image_names([record]):
            first, own = united(groups.setdefault(name, group)), united(group)
            if first != own:
                joined[own] = first
    settled = [replace(r, id=ids[r.id], group=united(r.group or ids[r.id])) for r in ordered]
    return tuple(sorted(settled, key=lambda record: record.id))


def _name(record: Record, whole: bool) -> str:
    """A record by one of its images, or by both and the parts that it may go to (``whole``)."""
    names = image_names([record])
    return "+".join([*names, *record.parts]) if whole else names[-1]


def _safe(path: str) -> str:
    safe = re.sub(r"[^\w.-]+", "_", path.replace("/", "-")).strip(".")
    return safe.encode()[:MAX_ID_BYTES].decode("utf-8", "ignore")


def collect(
    container: Container, place: Callable[[str], tuple[Capture, str] | None], needed: Sequence[str]
) -> dict[Capture, dict[str, str]]:
    """The files of each capture, by view; each must have the views ``needed``.

    ``place`` maps the name of a file to its capture and view; None: it is not read.

    Raises:
        DataError: Two files are the same view of a capture, or a view is missing.
    """
    captures: dict[Capture, dict[str, str]] = {}
    for name in container.names():
        placed = place(name)
        if placed is None:
            continue
        capture, view = placed
        files = captures.setdefault(capture, {})
        if view in files:
            alike = nfc(name) == nfc(files[view])
            both = map(ascii if alike else str, (container.describe(name), files[view]))
            raise DataError(f"{' and '.join(both)} have the same name: remove one of them")
        files[view] = name
    for files in captures.values():
        for view in needed:
            if view not in files:
                raise DataError(
                    f"{container.describe(next(iter(files.values())))} has no partner ({view}): "
                    "restore it, or remove this one"
                )
    return captures


def compare_counts(
    names: Iterable[str], published: Mapping[str, int], kind: str
) -> tuple[str, ...]:
    """One warning for each class, sensor or fold whose number of samples is not the published."""
    counts = Counter(names)
    return tuple(
        f"{kind} {name} has {counts[name]} samples, published are {published.get(name, 0)}"
        for name in sorted(set(counts) | set(published))
        if counts[name] != published.get(name, 0)
    )
