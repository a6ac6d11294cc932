"""How new images of the target sensor are read: exactly as ``sfkt prepare`` read the others.

They come from files, or as frames of a video file, a camera or a network stream, through OpenCV
(extra ``video``).

The module also judges whether an image may come from the sensor, by the images of the training. A
classifier names a class for anything: a black frame, a lens cap, the images of another sensor.
Three numbers of each image tell most of these apart, and their usual range is in model.json.
"""

import contextlib
import queue
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.console import warn
from sfkt_cli.data.decode import MAX_PIXELS, decode_target, is_coloured, known_type
from sfkt_cli.data.images import Encoding
from sfkt_cli.data.loading import Fit, TargetValues, fit_target
from sfkt_cli.data.readers.sun_rgbd import FARTHEST_MM, undo_rotation
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.files import read_settings
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.runs import Run, known_settings

LARGEST = 96  # pixels across, at most, that are looked at
MORE_MISSING = 0.15  # share of missing pixels beyond the usual that is no cause for doubt
WIDER = 0.5  # likewise for values, as a share of their usual range
FLATTER = 0.25  # an image with less than this share of the usual contrast is doubted

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts")

GREY_16 = (b"Y1\x00\x10", b"\x10\x001Y", b"Y16 ", b"Y16\xa0", b"Y12 ", b"Y10 ")
"""Names of frames of 16 bit, which OpenCV would cut to 8: FFmpeg's, and V4L2's for cameras."""


@dataclass(frozen=True)
class Sensor:
    """What a model expects of its target images; travels with exported models."""

    modality: str  # depth, nir, thermal or other
    unit: str  # how integers and floats are meant: auto, mm, m or raw
    dtype: str  # type of stored values; empty: any
    channels: int  # number of channels of an image
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
    def meaning(self) -> str:
        """Unit of stored values, ``mm`` or ``raw``, what 0 is, and how raw values become such."""
        values = " and ".join(f"{value:.9g}" for value in self.no_reading)
        instead = "0" if self.missing else "the median of the others"
        steps = [f"set {values} to {instead}"] if values else []
        scale = 1000 if self.missing and self.unit == "m" else self.scale
        steps += [f"multiply by {scale:.9g}"] if scale else []
        steps += [f"set more than {FARTHEST_MM} to {FARTHEST_MM}"] if self.rotated else []
        unit = "mm" if self.missing and self.unit != "raw" else "raw"
        none = ", 0 = no reading" if self.missing else ""
        first = f"; first {', then '.join(steps)}" if steps else ""
        if self.dtype == "uint8":  # floats would become 16 bit
            return f"{unit}{none}{first}"
        floats = "are like whole numbers"
        if self.missing and self.unit == "auto" and scale is None:
            floats = "are metres, multiply them by 1000"
        elif not self.missing and self.unit != "raw":
            floats = "are 0..1, multiply them by 65535"
        return f"{unit}{none}{first}; floats {floats}; NaN becomes {instead}"

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """An image file to (S, S) or (S, S, C) in the stored unit; raises DataError if damaged."""
        return self.to_size(self.decode_unfitted(content, name))

    def decode_unfitted(self, content: bytes, name: str) -> NDArray[Any]:
        """The same at its own size."""
        values = decode_target(
            content, name, self.max_pixels, self.no_reading, missing=self.missing
        )
        return undo_rotation(values, name) if self.rotated else self.to_unit(values, name)

    def fit_values(self, values: NDArray[Any], name: str = "the image") -> NDArray[Any]:
        """A raw image (H, W) or (H, W, C) of the sensor, to the model's size and unit."""
        return self.to_size(self.to_unit(values, name))

    def to_unit(self, values: NDArray[Any], name: str = "the image") -> NDArray[Any]:
        """The same at its own size; raises DataError if its values are not what is expected."""
        values = known_type(values, name, self.no_reading, missing=self.missing)
        expected = TargetValues(self.modality, self.unit, self.dtype, self.channels, self.scale)
        stored = expected.convert(values, name)
        return np.minimum(stored, stored.dtype.type(FARTHEST_MM)) if self.rotated else stored

    def to_size(self, stored: NDArray[Any]) -> NDArray[Any]:
        """An image in the model's unit to its size."""
        return fit_target(stored, self.image_size, self.fit, missing=self.missing)


def prepared_sensor(run: Run) -> Sensor:
    """The sensor whose images a run was prepared from, as `sfkt prepare` read them.

    Raises DataError if a prepared file is missing or damaged.
    """
    settings = known_settings(read_settings(run.path("prepare", "config.yaml")))
    return sensor_of_store(open_store(run.transfer_store), build(settings))


def sensor_of_store(store: Store, config: Config) -> Sensor:
    """The sensor whose images a file holds that was prepared with these settings."""
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


def describe_images(images: NDArray[Any], missing: bool) -> dict[str, Any]:
    """What is usual, for model.json: the middle 98 % of the training images.

    It is their dtype, and lowest and highest of: missing (share of pixels without a reading),
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
    return {"dtype": images.dtype.name, **{name: list(both) for name, both in ranges}}


def doubt(image: NDArray[Any], usual: Mapping[str, Any], missing: bool) -> str:
    """Why an image may not come from the sensor; empty if nothing looks wrong.

    ``usual`` is what :func:`describe_images` gave; empty: nothing is known.
    """
    if not usual:
        return ""
    share, middle, contrast = _numbers(image, missing)
    if image.dtype.name != usual["dtype"]:
        return f"values of type {image.dtype.name} (training images: {usual['dtype']})"
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


def is_live(entry: str) -> bool:
    """Whether it is a camera's number or an address: frames without an end."""
    return "://" in entry or (entry.isdecimal() and not Path(entry).exists())


def is_video(entry: str) -> bool:
    """Whether it is a live stream or a video file."""
    return is_live(entry) or Path(entry).suffix.lower() in VIDEOS


def without_password(address: str) -> str:
    """The address of a stream for messages and rows, without the user's name and password."""
    return re.sub(r"//[^/]*@", "//", address)


def frames(entry: str, sensor: Sensor) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and stored images of all frames; of a live stream always the newest one.

    The entry is a video file, a camera's number, or an address such as ``rtsp://...``. A file's
    frames are named ``clip.mp4#12``, from 0; those of a live stream by the time.

    Raises:
        ConfigError: OpenCV is not installed.
        DataError: It cannot be opened, ends too early, or shows no images of this sensor.
    """
    live, address = is_live(entry), without_password(entry)
    try:
        import cv2
    except ImportError:
        raise ConfigError(
            f"{address} is a video, which needs OpenCV: pip install 'sfkt[video]'"
        ) from None
    capture = cv2.VideoCapture(int(entry) if entry.isdecimal() and live else entry)
    if not capture.isOpened():
        raise DataError(
            f"{address} cannot be opened as a video: does it exist, and play elsewhere?"
        )
    formats = (capture.get(name) for name in (cv2.CAP_PROP_CODEC_PIXEL_FORMAT, cv2.CAP_PROP_FOURCC))
    names = [int(code).to_bytes(8, "little", signed=True)[:4] for code in formats]
    if sensor.dtype == "uint8" and not set(GREY_16).isdisjoint(names):
        raise DataError(
            f"{address} holds values of 16 bit, expected uint8: all target images must be alike"
        )
    # Not for 8 bit: the values of YUV as they are lie between 16 and 235, and holes are not 0.
    if (sensor.dtype or (sensor.missing and "uint16")) == "uint16":
        capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
    coloured, count = False, 0
    for count, frame in enumerate(_newest(capture) if live else _all(capture), 1):
        when = datetime.now().isoformat(timespec="milliseconds") if live else str(count - 1)
        name = f"{address}#{when}"
        planes = frame.shape[2] if frame.ndim == 3 else 1
        if planes == 3 and sensor.channels == 1:
            if not coloured and is_coloured(frame):
                warn(f"{name} is coloured, its grey values are used: switch false colours off")
                coloured = True
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        elif planes == 3:
            frame = frame[:, :, ::-1]
        yield name, sensor.fit_values(np.squeeze(frame), name)
    expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if not count or (not live and count < 0.9 * expected):
        raise DataError(f"{address} ends after {count} of {expected} frames: is it damaged?")
    if live:
        raise DataError(f"{address} has ended: is the camera still there?")


def _all(capture: Any) -> Iterator[NDArray[Any]]:
    while (answer := capture.read())[0]:
        yield answer[1]


def _newest(capture: Any) -> Iterator[NDArray[Any]]:
    """Frames read in a thread; those that come while the last one is looked at are dropped."""
    newest: queue.Queue[NDArray[Any] | None] = queue.Queue(1)

    def read() -> None:
        for frame in _all(capture):
            with contextlib.suppress(queue.Empty):
                newest.get_nowait()
            newest.put(frame)
        newest.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (frame := newest.get()) is not None:
        yield frame
