"""The target sensor: what the values of its images mean, and how images become stored ones.

Each reader knows what its target values mean. For your own images, the modality decides on the
unit, the valid range and the default encoding, and on nothing else. New images are read exactly as
``sfkt prepare`` read the others.

The module also judges whether an image may come from the sensor, by the images of the training. A
classifier names a class for anything: a black frame, a lens cap, the images of another sensor.
Three numbers of each image tell most of these apart, and their usual range is in model.json.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.decode import FINER, MAX_PIXELS, as_image_values, decode_target
from sfkt_cli.data.grid import Fit, fit_target
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import DataError
from sfkt_cli.files import read_settings
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.runs import Run, known_settings

FARTHEST_MM = 8000  # of SUN RGB-D
LARGEST = 96  # pixels across, at most, that are looked at
MORE_MISSING = 0.15  # share of missing pixels beyond the usual that is no cause for doubt
WIDER = 0.5  # likewise for values, as a share of their usual range
FLATTER = 0.25  # an image with less than this share of the usual contrast is doubted


@dataclass(frozen=True)
class Sensor:
    """How images of a sensor are read; travels with the models that are made for it."""

    modality: str  # depth, nir, thermal or other
    unit: str  # how integers and floats are meant: auto, mm, m or raw
    dtype: str  # type of stored values, uint8 or uint16; empty: any
    channels: int  # number of channels of an image; 0: any
    image_size: int  # side of the square model input, in pixels
    fit: Fit  # crop or squash
    rotated: bool = False  # depth values have their bits rotated, as in SUN RGB-D's files
    max_pixels: int = MAX_PIXELS  # larger image files are refused
    scale: float | None = None  # millimetres that 1 stands for; None: as the unit says
    no_reading: tuple[float, ...] = ()  # values that become 0, or the median where 0 is a reading

    def __post_init__(self) -> None:
        """JSON knows no tuples."""
        object.__setattr__(self, "no_reading", tuple(self.no_reading))

    @property
    def missing(self) -> bool:
        """Whether 0 means "no reading"."""
        return self.modality == "depth"

    @property
    def stored_unit(self) -> str:
        """``mm`` for depth in a known unit, else ``raw``."""
        return "mm" if self.missing and self.unit != "raw" else "raw"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(S, S), or (S, S, C) of several channels."""
        side = self.image_size
        return (side, side) if self.channels == 1 else (side, side, self.channels)

    @property
    def meaning(self) -> str:
        """Unit of stored values, what 0 is, and how raw values become such."""
        values = " and ".join(f"{value:.9g}" for value in self.no_reading)
        instead = "0" if self.missing else "the median of the others"
        steps = [f"set {values} to {instead}"] if values else []
        scale = 1000 if self.missing and self.unit == "m" else self.scale
        steps += [f"multiply by {scale:.9g}"] if scale else []
        steps += [f"set more than {FARTHEST_MM} to {FARTHEST_MM}"] if self.rotated else []
        unit = self.stored_unit + (", 0 = no reading" if self.missing else "")
        first = f"; first {', then '.join(steps)}" if steps else ""
        if self.dtype == "uint8":  # floats would become 16 bit
            return f"{unit}{first}"
        floats = ""
        if self.missing and self.unit == "auto" and scale is None:
            floats = "; if the sensor itself gives floats, they are metres: multiply them by 1000"
        elif not self.missing and self.unit != "raw":
            floats = "; if the sensor itself gives floats, they are 0..1: multiply them by 65535"
        odd = ", as do values below 0 or beyond 65535" if self.stored_unit == "mm" else ""
        return f"{unit}{first}{floats}; NaN and infinity become {instead}{odd}; round the others"

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """An image file to (S, S) or (S, S, C) in the stored unit; raises DataError if damaged."""
        return self.to_size(self.decode_unfitted(content, name))

    def decode_unfitted(self, content: bytes, name: str) -> NDArray[Any]:
        """The same at its own size."""
        return self.convert(self.values_of(content, name), name)

    def values_of(self, content: bytes, name: str) -> NDArray[Any]:
        """The values of an image file, but for those that stand for no reading."""
        values = decode_target(
            content, name, self.max_pixels, self.no_reading, missing=self.missing
        )
        if self.rotated and values.dtype == np.uint16:
            values = (values >> 3) | (values << 13)
        return values

    def fit_values(self, values: NDArray[Any], name: str = "the image") -> NDArray[Any]:
        """A raw image (H, W) or (H, W, C) of the sensor, to the model's size and unit."""
        values = as_image_values(values, name, self.no_reading, missing=self.missing)
        return self.to_size(self.convert(values, name))

    def to_size(self, stored: NDArray[Any]) -> NDArray[Any]:
        """An image in the model's unit to its size."""
        return fit_target(stored, self.image_size, self.fit, missing=self.missing)

    def convert(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        """Values in the stored unit, uint8 or uint16; raises DataError if they do not fit."""
        if self.missing and values.ndim == 3:
            raise DataError(
                f"{name} holds {describe_values(values)}, depth has one: "
                "is it an RGB image, or are rgb and target swapped?"
            )
        stored = self._depth(values, name) if self.stored_unit == "mm" else self._raw(values, name)
        channels = stored.shape[2] if stored.ndim == 3 else 1
        wrong_type = self.dtype and stored.dtype.name != self.dtype
        if wrong_type or (self.channels and channels != self.channels):
            expected = " of ".join(str(part) for part in (self.channels, self.dtype) if part)
            raise DataError(
                f"{name} holds {describe_values(stored)}, expected {expected}: "
                "all target images must be alike"
            )
        return np.minimum(stored, stored.dtype.type(FARTHEST_MM)) if self.rotated else stored

    def _depth(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        floats = values.dtype.kind == "f"
        metres = self.unit == "m" or (self.unit == "auto" and floats)
        if self.scale is not None or metres or floats:
            return to_millimetres(values, self.scale or (1000.0 if metres else 1.0), name)
        if values.dtype == np.uint8 and self.unit == "auto":
            advice = (
                "if the camera measures no depth, set folders.modality=thermal (or nir, or other); "
                "if there is no better depth, set folders.unit=raw"
            )
            raise DataError(
                f"{name} holds depth of 8 bit, expected 16-bit millimetres or float metres: "
                f"{'all target images must be alike' if self.dtype else advice}"
            )
        return values.astype(np.uint16)

    def _raw(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        if values.dtype.kind != "f":
            return values
        finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(finite.min()), float(finite.max())
        largest = 65535.0 if self.unit == "raw" else 1.0
        if low < 0 or high > largest:
            other = f"scale to that, or {FINER}, and set folders.unit=raw, which rounds them"
            raise DataError(
                f"{name} has values from {low:g} to {high:g}, expected 0..{largest:g}: "
                f"{FINER if self.unit == 'raw' else other}; name values that stand for no reading "
                "in folders.missing"
            )
        scaled: NDArray[Any] = np.rint(finite * (65535.0 / largest)).astype(np.uint16)
        return scaled

    def changes(self, now: "Sensor") -> str:
        """What of prepared images is not as this sensor's are, with both values; "" if nothing."""
        values = asdict(replace(now, max_pixels=self.max_pixels)).items()  # a limit of the files
        changed = {name: value for name, value in values if getattr(self, name) != value}
        return ", ".join(f"{n} {getattr(self, n)!r} (now {v!r})" for n, v in changed.items())


def describe_values(values: NDArray[Any]) -> str:
    """Such as ``3 channels of uint8``."""
    channels = values.shape[2] if values.ndim == 3 else 1
    return f"{channels} channel{'s'[: channels > 1]} of {values.dtype}"


def to_millimetres(values: NDArray[Any], scale: float, name: str) -> NDArray[np.uint16]:
    """Depth as whole millimetres; NaN, infinities and negative values are no reading.

    ``scale``: millimetres that 1 stands for.

    Raises:
        DataError: The unit is another one: the median lies beyond 65.5 m.
    """
    with np.errstate(over="ignore"):
        millimetres = values * float(scale)  # an integer would keep 16 bits, and wrap around
    readings = millimetres[np.isfinite(millimetres) & (millimetres > 0)]
    if readings.size and float(np.median(readings)) > 65535:
        raise DataError(
            f"{name} has a median depth of {float(np.median(readings)) / 1000:,.0f} m: say what "
            "the values are with folders.unit or folders.scale, and what stands for no reading "
            "with folders.missing"
        )
    valid = (millimetres > 0) & (millimetres <= 65535)
    return np.rint(np.where(valid, millimetres, 0)).astype(np.uint16)


def prepared_sensor(run: Run) -> Sensor:
    """The sensor whose images a run was prepared from, as `sfkt prepare` read them.

    Raises DataError if a prepared file is missing or damaged.
    """
    config = build(known_settings(read_settings(run.path("prepare", "config.yaml"))))
    store = open_store(run.transfer_store)
    images = store.columns["target/target"]
    return sensor_of_config(
        config,
        modality=store.modality,
        dtype=images.dtype.name,
        channels=images.shape[3] if len(images.shape) == 4 else 1,
        image_size=images.shape[1],
        fit=store.attrs.get("fit", config.prepare.fit),
    )


def sensor_of_config(config: Config, **known: Any) -> Sensor:
    """The sensor of the configured data set; ``known`` are fields that the settings do not tell."""
    own = config.dataset == "folders"
    told = {
        "unit": config.folders.unit if own else "auto",
        "scale": config.folders.scale if own else None,
        "no_reading": config.folders.missing if own else (),
        "rotated": config.dataset == "sun-rgbd",
        "max_pixels": config.prepare.max_pixels,
        "image_size": config.image_size,
        "fit": config.prepare.fit,
    }
    return Sensor(**{**told, **known})


def describe_images(images: NDArray[Any], missing: bool) -> dict[str, Any]:
    """What is usual, for model.json: the middle 98 % of the training images.

    It is the lowest and highest of: missing (share of pixels without a reading),
    middle (the median value), contrast (from the 5th to the 95th percentile). Nothing, where no
    image has a reading. ``missing``: whether 0 means "no reading".
    """
    numbers = np.array([_numbers(image, missing) for image in images])
    numbers = numbers[np.isfinite(numbers).all(axis=1)]
    if not len(numbers):
        return {}
    low, high = np.percentile(numbers, (1, 99), axis=0).round(4)
    names = ("missing", "middle", "contrast")
    ranges = zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True)
    return {name: list(both) for name, both in ranges}


def doubt(image: NDArray[Any], usual: Mapping[str, Any], missing: bool) -> str:
    """Why an image may not come from the sensor; empty if nothing looks wrong.

    ``usual`` is what :func:`describe_images` gave; empty: nothing is known.
    """
    if not usual:
        return ""
    share, middle, contrast = _numbers(image, missing)
    most = usual["missing"][1]
    if share > min(most + MORE_MISSING, 0.999):
        return f"no reading in {share:.0%} of the pixels (training images: up to {most:.0%})"
    low, high = usual["middle"]
    margin = WIDER * max(high - low, 0.2 * high)
    if not max(low - margin, WIDER * low) <= middle <= high + margin:
        return f"values around {middle:,.0f} (training images: {low:,.0f} to {high:,.0f})"
    least = usual["contrast"][0]
    if contrast < FLATTER * least:
        return f"values differ by only {contrast:,.0f} (training images: {least:,.0f} or more)"
    return ""


def _numbers(image: NDArray[Any], missing: bool) -> tuple[float, float, float]:
    """Share of pixels without a reading, median, and contrast; the last two NaN without any."""
    step = max(1, image.shape[0] // LARGEST)
    few = image[::step, ::step]
    readings = few[few > 0] if missing else few
    if not readings.size:
        return 1.0, float("nan"), float("nan")
    low, middle, high = np.percentile(readings, (5, 50, 95))
    return 1.0 - readings.size / few.size, float(middle), float(high - low)
