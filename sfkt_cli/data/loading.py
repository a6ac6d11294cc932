"""Image files of a folder or zip file, as stored images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.archive import Container
from sfkt_cli.data.decode import decode_rgb
from sfkt_cli.data.grid import fit_rgb, fit_target
from sfkt_cli.data.records import Archive, Record, image_names
from sfkt_cli.data.sensor import Sensor, sensor_of_config
from sfkt_cli.settings.config import Config


@dataclass(frozen=True)
class FileLoader:
    """Decodes, converts and resamples image files."""

    container: Container
    sensor: Sensor

    def rgb(self, record: Record, size: int) -> NDArray[np.uint8]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return fit_rgb(self.picture(record.rgb or "", size), size, self.sensor.fit)

    def target(self, record: Record, size: int) -> NDArray[Any]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        values = self.target_values(record.target or "")
        return fit_target(values, size, self.sensor.fit, missing=self.sensor.missing)

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
        modality=modality,
        unit=sensor.stored_unit,
        dtype=dtype,
        **about,
    )
