"""How new images of the target sensor are read: exactly as ``sfkt prepare`` read the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import NDArray

from sfkt_cli.data.decode import MAX_PIXELS, decode_target, known_type
from sfkt_cli.data.images import Encoding
from sfkt_cli.data.loading import TargetValues
from sfkt_cli.data.readers.sun_rgbd import undo_rotation
from sfkt_cli.data.resample import Fit, fit_target
from sfkt_cli.data.store import Store
from sfkt_cli.settings.config import Config


@dataclass(frozen=True)
class Sensor:
    """What a model expects of its target images; travels with exported models.

    Attributes:
        modality: depth, nir, thermal or other.
        unit: How integers and floats are meant: auto, mm, m or raw.
        dtype: Type of stored values; empty: any.
        channels: Number of channels of an image.
        image_size: Side of the square model input, in pixels.
        fit: crop or squash.
        rotated: Depth values have their bits rotated, as in SUN RGB-D's files.
        max_pixels: Larger image files are refused.
        scale: Millimetres that 1 stands for; None: as the unit says.
        no_reading: Values that become 0.
    """

    modality: str
    unit: str
    dtype: str
    channels: int
    image_size: int
    fit: Fit
    rotated: bool = False
    max_pixels: int = MAX_PIXELS
    scale: float | None = None
    no_reading: tuple[float, ...] = ()

    @property
    def missing(self) -> bool:
        """Whether 0 means "no reading"."""
        return self.modality == "depth"

    @property
    def meaning(self) -> str:
        """Unit of its values: ``mm`` or ``raw``, and what 0 is."""
        unit = "mm" if self.missing and self.unit != "raw" else "raw"
        return f"{unit}, 0 = no reading" if self.missing else unit

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """The bytes of an image file to (S, S) or (S, S, C) in the stored unit.

        Raises:
            DataError: The file is damaged, or its values are not what the model expects.
        """
        return self.to_size(self.decode_unfitted(content, name))

    def decode_unfitted(self, content: bytes, name: str) -> NDArray[Any]:
        """The same at its own size."""
        return self.to_unit(decode_target(content, name, self.max_pixels, self.no_reading), name)

    def fit_values(self, values: NDArray[Any], name: str = "the image") -> NDArray[Any]:
        """A raw image (H, W) or (H, W, C) of the sensor to the model's size and unit.

        Raises:
            DataError: The values are not what the model expects.
        """
        return self.to_size(self.to_unit(values, name))

    def to_unit(self, values: NDArray[Any], name: str = "the image") -> NDArray[Any]:
        """A raw image of the sensor to the model's unit, at its own size.

        Raises:
            DataError: The values are not what the model expects.
        """
        values = known_type(values, name, self.no_reading)
        if self.rotated:
            return undo_rotation(values, name)
        expected = TargetValues(self.modality, self.unit, self.dtype, self.channels, self.scale)
        return expected.convert(values, name)

    def to_size(self, stored: NDArray[Any]) -> NDArray[Any]:
        """An image in the model's unit to its size."""
        return fit_target(stored, self.image_size, self.fit, missing=self.missing)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for model.json."""
        return asdict(self)


def sensor_of_store(store: Store, config: Config) -> Sensor:
    """The sensor whose images a prepared file holds."""
    images = store.columns["target/target"]
    return Sensor(
        modality=store.modality,
        dtype=images.dtype.name,
        channels=images.shape[3] if len(images.shape) == 4 else 1,
        image_size=images.shape[1],
        fit=store.attrs.get("fit", config.prepare.fit),
        **_meaning(config, store.dataset),
    )


def sensor_of_settings(config: Config, encoding: Encoding) -> Sensor:
    """The same from what a model was trained with, where the prepared files are gone."""
    usual = "depth" if encoding.missing else "other"
    return Sensor(
        modality=config.folders.modality if config.dataset == "folders" else usual,
        dtype="",
        channels=encoding.channels,
        image_size=config.image_size,
        fit=config.prepare.fit,
        **_meaning(config, config.dataset),
    )


def _meaning(config: Config, dataset: str) -> dict[str, Any]:
    """What the values of a data set's files mean, and how large the files may be."""
    own = dataset == "folders"
    return {
        "unit": config.folders.unit if own else "auto",
        "scale": config.folders.scale if own else None,
        "no_reading": config.folders.missing if own else (),
        "rotated": dataset == "sun-rgbd",
        "max_pixels": config.prepare.max_pixels,
    }
