"""Image files to arrays, with the checks that keep wrong data from passing as right.

Pillow clips 16-bit depth at 255 when it converts to RGB, and reads 16-bit RGB files as 8 bit
without a word; so modes and bit depths are looked at before anything is converted. It stretches
samples of less than 8 or 16 bits, and reads some TIFF files unlike other programs. So PNM is parsed
here, and tifffile reads TIFF. Images are turned as their EXIF orientation says, as viewers do.
"""

import contextlib
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sfkt_cli.errors import DataError, first_line

MAX_PIXELS = 100_000_000
GREY = 8  # mean difference of the channels of a picture that has no colours, in 8 bit, at most
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pnm"),
    *(".webp", ".npy"),
)
FINER = "add an offset and scale, degrees C to hundredths of a kelvin for example"
READABLE = "PNG, JPEG, TIFF, BMP, PGM, PPM, WebP and NPY"
_NOTES = (
    *(".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".log"),
    *(".html", ".pdf"),
)
"""What usually lies beside images and is none."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN = (1, 2)  # TIFF's photometrics grey with 0 = black, and RGB
_YCBCR_JPEG = (6, 7)  # photometric YCbCr and compression JPEG, which tifffile turns into RGB
_opening = threading.Lock()  # Pillow's limit is one for all threads
_complaints: ContextVar[list[str] | None] = ContextVar("complaints", default=None)
# Of odd tags. Once and for all: what a thread changes while it reads holds for all threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
_PNM = re.compile(rb"P([2356])" + 3 * rb"(?:\s|#[^\n\r]*[\n\r])+(\d{1,9})" + rb"\s")


def decode_rgb(
    content: bytes, name: str, size: int = 0, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an 8-bit colour image.

    A JPEG may be decoded at a fraction of its size if both sides keep twice ``size`` pixels; 0:
    full size.

    Raises:
        DataError: Damaged, of one channel, of 16 bit, or too large.
    """
    samples = _read_samples(content, name, max_pixels)
    if samples is not None:
        return _as_colour(samples, name)
    image = _open(content, name, max_pixels)
    if size and image.format == "JPEG":
        image.draft("RGB", (2 * size, 2 * size))
    _check_bits(image, name)
    if image.mode not in ("RGB", "RGBA", "P"):
        raise _no_colour(f"mode {image.mode}", name, grey=image.mode in ("1", "L", "LA", "I;16"))
    _load(image, name)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_target(
    content: bytes,
    name: str,
    max_pixels: int = MAX_PIXELS,
    no_reading: Sequence[float] = (),
    *,
    missing: bool = True,
) -> NDArray[Any]:
    """Decode a target image as it is stored: (H, W) or (H, W, C), uint8, uint16 or float32.

    Values that stand for no reading are replaced as in :func:`as_image_values`.

    Raises:
        DataError: Damaged, of another type, or too large.
    """
    samples = _read_samples(content, name, max_pixels)
    if samples is None:
        image = _open(content, name, max_pixels)
        _check_bits(image, name)
        _load(image, name)
        if image.mode not in ("L", "I;16", "LA", "RGB", "RGBA"):
            raise DataError(f"{name} has mode {image.mode}, expected 8-bit, 16-bit or float values")
        samples = np.asarray(image)
    return as_image_values(samples, name, no_reading, missing=missing)


def _open(content: bytes, name: str, max_pixels: int) -> Image.Image:
    if not content:
        raise DataError(f"{name} is empty (0 bytes)")
    try:
        image = _open_any_size(content)
    except Exception as error:  # Pillow raises almost anything on damaged bytes
        why = first_line(error)
        if isinstance(error, UnidentifiedImageError):  # its text is the address of the bytes
            why = "its content is of no known kind"
        if content.startswith(b"\x89PNG"):
            raise DataError(f"{name} is damaged or cut off: {why}") from None
        raise DataError(
            f"{name} cannot be read as an image: {why}; convert it: {READABLE} are read"
        ) from None
    _check_size(name, image.width, image.height, max_pixels)
    if image.format == "PNG":  # loading compares no checksums of pixels; a flipped bit would pass
        with _explaining(name):
            _open_any_size(content).verify()
    return image


def _open_any_size(content: bytes) -> Image.Image:
    """Read the header of an image; ``max_pixels`` is the limit, not Pillow's."""
    with _opening:
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = usual


@contextlib.contextmanager
def _explaining(name: str, problem: str = "is damaged or cut off") -> Iterator[None]:
    """Turn whatever a library raises on damaged bytes, which is almost anything, to a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} {problem}: {first_line(error)}") from None


def _load(image: Image.Image, name: str) -> None:
    with _explaining(name):
        image.load()
        image.getexif()  # the image keeps it
        image.info.clear()  # or it is written anew without the orientation, which odd tags prevent
        ImageOps.exif_transpose(image, in_place=True)


def _check_bits(image: Image.Image, name: str) -> None:
    """Refuse what Pillow would read in part or stretch without a word."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in ("PNG", "WEBP"):  # a photograph may hold a preview of itself
        raise DataError(
            f"{name} holds {frames} pictures, expected one: save only the one that you need"
        )
    layout = "".join(str(tile[3]) for tile in getattr(image, "tile", ())[:1])
    if image.mode != "I;16" and ";16" in layout:
        raise DataError(
            f"{name} has 16 bits a channel, expected 8-bit colour: convert it to 8 bits, or a "
            "target image of several channels to TIFF or NPY"
        )
    if layout in ("L;2", "L;4"):
        raise DataError(f"{name} has {layout[2]} bits a pixel: convert it to 8 or 16 bits")


def _as_colour(samples: NDArray[Any], name: str) -> Image.Image:
    channels = samples.shape[2] if samples.ndim == 3 else 1
    if samples.ndim not in (2, 3) or channels > 4:
        raise DataError(f"{name} has shape {samples.shape}, expected (H, W, 3): convert it to RGB")
    if channels < 3:
        raise _no_colour(f"{channels} channel{'s'[: channels > 1]}", name, grey=True)
    if samples.dtype != np.uint8:
        raise DataError(
            f"{name} has values of type {samples.dtype}, expected 8-bit colour (uint8): convert it "
            "to 8 bits, or are RGB and target swapped?"
        )
    return Image.fromarray(np.ascontiguousarray(samples[:, :, :3]))


def _no_colour(layout: str, name: str, *, grey: bool) -> DataError:
    swapped = "; or are RGB and target swapped?" if grey else ""
    return DataError(f"{name} has {layout}, expected an RGB image: convert it to RGB{swapped}")


def tell_unread(names: Iterable[str]) -> str:
    """A message about files that are not read but may be images; "" if there are none."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in SUFFIXES + _NOTES:
            kinds.setdefault(suffix or "without suffix", []).append(name)
    if not kinds:
        return ""
    counts = "; ".join(f"{len(some)} {kind}, such as {some[0]}" for kind, some in kinds.items())
    return f"not read: {counts}; if they are images, convert them: {READABLE} are read"


def _read_samples(content: bytes, name: str, max_pixels: int) -> NDArray[Any] | None:
    """TIFF, PNM and NPY, mostly as (H, W) or (H, W, C); None where the content is none of them."""
    if content.startswith(_TIFF):
        return _decode_tiff(content, name, max_pixels)
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        return _decode_npy(content, name, max_pixels)
    if re.match(rb"P[2356]\s", content):
        return _decode_pnm(content, name, max_pixels)
    return None


def _decode_tiff(content: bytes, name: str, max_pixels: int) -> NDArray[Any]:
    """One page, or two to four equal ones, which are channels."""
    import tifffile

    complaints: list[str] = []
    with (
        _explaining(name),
        _listening(complaints),
        tifffile.TiffFile(io.BytesIO(content)) as file,
    ):
        page, series = file.pages.first, file.series[0]
        sides = dict(zip(series.axes, series.shape, strict=True))
        channels = [axis for axis in series.axes if axis not in "YX"]
        pages = sum(1 + len(page.subifds or ()) for page in file.pages)
        alike = len(file.series) == 1 and pages == len(file.pages) <= 4
        if not alike or len(channels) > 1:
            raise DataError(
                f"{name} holds {max(pages, len(series))} pages, shape {series.shape}: expected "
                "one, or 2 to 4 equal ones of one channel each; save only the one that you need"
            )
        _check_size(name, sides["X"], sides["Y"], max_pixels, *(sides[a] for a in channels))
        stored = (page.photometric, page.compression)
        if page.photometric not in _PLAIN and stored != _YCBCR_JPEG:
            kind = getattr(page.photometric, "name", page.photometric)
            raise DataError(
                f"{name} has photometric {kind}, expected RGB or grey values with 0 = black: "
                "convert it"
            )
        values = np.asarray(series.asarray(maxworkers=1))
        if channels:
            values = np.moveaxis(values, series.axes.index(channels[0]), 2)
        orientation = int(page.tags.valueof(274) or 1)
    if complaints:
        raise DataError(f"{name} is damaged or cut off: {complaints[0][:160]}; write it again")
    return _upright(values, orientation)


def _upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an image as TIFF's tag Orientation says: 1 is upright, from 5 on it lies on its side."""
    if not 1 <= orientation <= 8:
        return image
    down, across = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return (image.swapaxes(0, 1) if orientation > 4 else image)[::down, ::across]


@contextlib.contextmanager
def _listening(complaints: list[str]) -> Iterator[None]:
    """Collect the errors that tifffile only logs; its messages are dropped."""
    before = _complaints.set(complaints)
    try:
        yield
    finally:
        _complaints.reset(before)


def _keep_complaint(record: logging.LogRecord) -> bool:
    """Whether a message of tifffile is shown: one of an image that is not read here."""
    complaints = _complaints.get()
    if complaints is not None and record.levelno >= logging.ERROR:
        complaints.append(record.getMessage())
    return complaints is None


logging.getLogger("tifffile").addFilter(_keep_complaint)


def _decode_pnm(content: bytes, name: str, max_pixels: int) -> NDArray[Any]:
    """PGM and PPM, plain or raw: samples as they are, whatever the largest possible one is."""
    header = _PNM.match(content)
    if header is None:
        raise DataError(f"{name} is damaged or cut off: its header names no size and maxval")
    kind, width, height, maxval = (int(number) for number in header.groups())
    _check_size(name, width, height, max_pixels)
    if not 0 < maxval < 65536:
        raise DataError(f"{name} is damaged: maxval {maxval} is not in 1..65535")
    colour = kind in (3, 6)
    if colour and maxval != 255:
        raise DataError(
            f"{name} has maxval {maxval}, expected 8-bit colour, maxval 255: convert it"
        )
    shape = (height, width, 3) if colour else (height, width)
    dtype = np.dtype(np.uint8 if maxval < 256 else ">u2")
    count, body = int(np.prod(shape)), content[header.end() :]
    with _explaining(name):
        if kind in (5, 6):
            rest = body[count * dtype.itemsize :]
            samples = np.frombuffer(body, dtype, count)
        else:
            words = re.sub(rb"#[^\n\r]*", b"", body).split()
            rest = b" ".join(words[count:])
            samples = np.array([int(word) for word in words[:count]], np.int64)
        values = samples.reshape(shape)
    if rest.strip():
        raise DataError(f"{name} holds more than one picture: save only the one you need")
    if not 0 <= samples.min() <= samples.max() <= maxval:
        raise DataError(f"{name} is damaged: samples up to {samples.max()}, maxval is {maxval}")
    return values.astype(dtype.newbyteorder("="))


def _decode_npy(content: bytes, name: str, max_pixels: int) -> NDArray[Any]:
    file, npy = io.BytesIO(content), np.lib.format
    with _explaining(name, "cannot be read as a NumPy file"):
        version = npy.read_magic(file)
        if version <= (3, 0):  # 3.0 differs from 2.0 in the names of fields alone
            read_header = npy.read_array_header_2_0
            if version == (1, 0):
                read_header = npy.read_array_header_1_0
            shape, _, dtype = read_header(file)
            if len(shape) > 1:  # before room is made for it
                _check_size(name, shape[1], shape[0], max_pixels)
            if math.prod(shape) * dtype.itemsize > len(content) and not dtype.hasobject:
                raise DataError(f"{name} is damaged or cut off: it lacks some of {shape} values")
        file.seek(0)
        values: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return values


def as_image_values(
    values: NDArray[Any], name: str, no_reading: Sequence[float] = (), *, missing: bool = True
) -> NDArray[Any]:
    """Whole numbers as uint8 or uint16, others as float32, in one of the shapes of images.

    Values in ``no_reading`` become 0 if 0 means "no reading" (``missing``). Otherwise they, NaN and
    infinities become the median of the readings of their channel, which no encoding notices.

    Raises:
        DataError: Shape or type is none of an image, or whole numbers are not in 0..65535.
    """
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[2] > 4):
        raise DataError(f"{name} has shape {values.shape}, expected (H, W) or (H, W, 1..4)")
    if values.dtype.kind not in "iuf":
        raise DataError(
            f"{name} has values of type {values.dtype}, expected 8-bit, 16-bit or float"
        )
    floats = values.dtype.kind == "f"
    with np.errstate(over="ignore"):
        values = values.astype(np.float32) if floats else values
        marks = np.asarray(no_reading, np.float32 if floats else None)
    lost = np.isin(values, marks) if marks.size else np.zeros((), np.bool_)
    if floats and not missing:
        lost = lost | ~np.isfinite(values)
    if lost.any():
        values = np.where(lost, values.dtype.type(0) if missing else _medians(values, lost), values)
    if floats or values.dtype in (np.uint8, np.uint16):
        return values
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{name} has values from {values.min()} to {values.max()}, expected 0..65535: "
            f"{'' if missing else f'{FINER}; '}name values that stand for no reading in "
            "folders.missing"
        )
    return values.astype(np.uint16)


def is_coloured(values: NDArray[Any]) -> bool:
    """Whether an image has three or four channels of 8 bit that differ: a picture with colours."""
    picture = values.ndim == 3 and values.shape[2] >= 3 and values.dtype == np.uint8
    return picture and float(np.ptp(values[:, :, :3], axis=2).mean()) > GREY


def _medians(values: NDArray[Any], lost: NDArray[np.bool_]) -> NDArray[Any]:
    """The lower median of the readings of each channel (C,), 0 where it has none."""
    planes, lost = np.atleast_3d(values), np.atleast_3d(lost)
    medians = np.zeros(planes.shape[2], values.dtype)
    for channel in range(len(medians)):
        readings = planes[:, :, channel][~lost[:, :, channel]]
        if len(readings):
            middle = (len(readings) - 1) // 2
            medians[channel] = np.partition(readings, middle)[middle]
    return medians


def _check_size(name: str, width: int, height: int, max_pixels: int, channels: int = 1) -> None:
    if not width or not height:
        raise DataError(f"{name} has {width} x {height} pixels")
    if width * height > max_pixels:
        raise DataError(
            f"{name} has {width} x {height} pixels, more than prepare.max_pixels = {max_pixels:,}"
        )
    if not 1 <= channels <= 4:
        raise DataError(f"{name} has {channels} channels, expected 1 to 4")


def decode_mask(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.bool_]:
    """An image of one channel as (H, W), true where it is not 0; raises DataError if it is none."""
    image = _open(content, name, max_pixels)
    if image.mode not in ("1", "L"):
        raise DataError(f"{name} has mode {image.mode}, expected a mask of one channel")
    _load(image, name)
    return np.asarray(image) > 0
