"""Image files to arrays, with the checks that keep wrong data from passing as right.

Pillow clips 16-bit depth at 255 when it converts to RGB, and reads 16-bit RGB files as 8 bit
without a word; so modes and bit depths are looked at before anything is converted. Images are
turned as their EXIF orientation says, as viewers do; of target TIFF files it is not read.
"""

from __future__ import annotations

import io
import warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sfkt_cli.errors import DataError

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".webp", ".npy")
_PNG = b"\x89PNG\r\n\x1a\n"


def decode_rgb(
    content: bytes, name: str, size: int = 0, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an 8-bit colour image.

    Args:
        content: The file's bytes.
        name: How messages call the file.
        size: A JPEG may be decoded at a fraction of its size if both sides keep twice this many
            pixels; 0: full size.
        max_pixels: Larger images are refused.

    Raises:
        DataError: Damaged, of one channel, of 16 bit, or too large.
    """
    image = _open(content, name, max_pixels)
    if size and image.format == "JPEG":
        image.draft("RGB", (2 * size, 2 * size))
    _check_bits(image, name)
    if image.mode not in ("RGB", "RGBA", "P"):
        raise DataError(
            f"{name} has mode {image.mode}, expected an RGB image: are RGB and target swapped?"
        )
    _load(image, name)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_target(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """Decode a target image as it is stored.

    Returns:
        (H, W) or (H, W, C), uint8, uint16 or float32.

    Raises:
        DataError: Damaged, of another type, or too large.
    """
    if name.lower().endswith(".npy"):
        return _decode_npy(content, name, max_pixels)
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _decode_tiff(content, name, max_pixels)
    image = _open(content, name, max_pixels)
    if image.mode not in ("L", "I;16", "I;16B", "I", "F"):
        _check_bits(image, name)
    _load(image, name)
    if image.mode not in ("L", "I;16", "I;16B", "I", "F", "LA", "RGB", "RGBA"):
        raise DataError(f"{name} has mode {image.mode}, expected 8-bit, 16-bit or float values")
    return _to_known_type(np.asarray(image), name)


def _open(content: bytes, name: str, max_pixels: int) -> Image.Image:
    if not content:
        raise DataError(f"{name} is empty (0 bytes)")
    if content.startswith(_PNG):
        _check_png(content, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # Pillow raises almost anything on damaged bytes
        raise DataError(f"{name} is no image that can be read: {_short(error)}") from None
    if image.width * image.height > max_pixels:
        raise DataError(
            f"{name} has {image.width} x {image.height} pixels, more than "
            f"prepare.max_pixels = {max_pixels:,}"
        )
    return image


def _load(image: Image.Image, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # as above
        raise DataError(f"{name} is damaged or cut off: {_short(error)}") from None


def _check_bits(image: Image.Image, name: str) -> None:
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        raise DataError(
            f"{name} has 16 bits a channel, expected 8-bit colour: convert it, or are RGB and "
            "target swapped?"
        )


def _check_png(content: bytes, name: str) -> None:
    """Pillow does not compare the checksums of pixel chunks; a flipped bit would pass."""
    position = len(_PNG)
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        end = position + 8 + length
        kind = content[position + 4 : position + 8]
        if end + 4 > len(content):
            break
        checksum = int.from_bytes(content[end : end + 4], "big")
        if zlib.crc32(memoryview(content)[position + 4 : end]) != checksum:
            raise DataError(f"{name} is damaged: a checksum of the PNG file does not match")
        if kind == b"IEND":
            return
        position = end + 4
    raise DataError(f"{name} is damaged or cut off: the PNG file has no end")


def _decode_tiff(content: bytes, name: str, max_pixels: int) -> NDArray[Any]:
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            if np.prod(page.shape, dtype=np.float64) > 4.0 * max_pixels:
                raise DataError(f"{name} has shape {page.shape}, more than prepare.max_pixels")
            values = np.asarray(page.asarray())
    except DataError:
        raise
    except Exception as error:  # tifffile, like Pillow, raises almost anything
        return _pillow_tiff(content, name, max_pixels, error)
    return _to_known_type(values, name)


def _pillow_tiff(content: bytes, name: str, max_pixels: int, error: Exception) -> NDArray[Any]:
    """Compressions that tifffile leaves to an optional package."""
    if not isinstance(error, (ImportError, ValueError)) or "imagecodecs" not in str(error):
        raise DataError(f"{name} is damaged or cut off: {_short(error)}") from None
    image = _open(content, name, max_pixels)
    if image.mode not in ("L", "I;16", "I;16B", "F"):
        raise DataError(f"{name} has mode {image.mode}, expected one channel")
    _load(image, name)
    return _to_known_type(np.asarray(image), name)


def _decode_npy(content: bytes, name: str, max_pixels: int) -> NDArray[Any]:
    try:
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else (np.lib.format.read_array_header_2_0)
        )
        shape, _, dtype = read(file)
        if np.prod(shape, dtype=np.float64) > 4.0 * max_pixels or dtype.hasobject:
            raise DataError(f"{name} declares {shape} values of type {dtype}; refused")
        values: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # a damaged header is evaluated by numpy and fails in many ways
        raise DataError(f"{name} is no NumPy file that can be read: {_short(error)}") from None
    return _to_known_type(values, name)


def _to_known_type(values: NDArray[Any], name: str) -> NDArray[Any]:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[2] > 4):
        raise DataError(f"{name} has shape {values.shape}, expected (H, W) or (H, W, 1..4)")
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype.kind in "iu":
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{name} has values from {values.min()} to {values.max()}, expected 0..65535"
            )
        return values.astype(np.uint16)
    raise DataError(f"{name} has values of type {values.dtype}, expected 8-bit, 16-bit or float")


def _short(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text is the address of the bytes
        return "its content is of no known kind"
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def decode_mask(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.bool_]:
    """Decode an image of one channel as (H, W), true where it is not 0.

    Raises:
        DataError: Damaged, of several channels, or too large.
    """
    image = _open(content, name, max_pixels)
    if image.mode not in ("1", "L"):
        raise DataError(f"{name} has mode {image.mode}, expected a mask of one channel")
    _load(image, name)
    return np.asarray(image) > 0
