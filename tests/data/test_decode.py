"""Decoding and resampling: bit-exact where nothing is asked, and holes that never blend."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.data.decode import as_image_values, decode_rgb, decode_target
from sfkt_cli.data.grid import fit_rgb, fit_target
from sfkt_cli.data.sensor import Sensor, to_millimetres
from sfkt_cli.errors import DataError
from tests.data.make_archives import encoded, npy, tiff

DEPTH = np.random.default_rng(0).integers(0, 65536, (48, 64)).astype(np.uint16)


@pytest.mark.parametrize("size", [48, 30])
def test_depth_is_bit_exact_where_no_resampling_is_asked(size: int) -> None:
    square = DEPTH[:size, :size]
    read = decode_target(encoded(square), "d.png")
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(fit_target(read, size, "crop", missing=True), square)


def test_middle_square_is_kept() -> None:
    np.testing.assert_array_equal(fit_target(DEPTH, 48, "crop", missing=True), DEPTH[:, 8:56])
    rgb = np.random.default_rng(1).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    kept = fit_rgb(decode_rgb(encoded(rgb), "c.png"), 48, "crop")
    np.testing.assert_array_equal(kept, rgb[:, 8:56])
    assert fit_target(DEPTH, 48, "squash", missing=True).shape == (48, 48)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(16, 90),
    st.floats(0, 1),
    st.integers(500, 60_000),
)
def test_holes_never_blend_into_readings(seed: int, size: int, share: float, near: int) -> None:
    rng = np.random.default_rng(seed)
    depth = rng.integers(near, near + 5000, (60, 80)).astype(np.uint16)
    depth[rng.random(depth.shape) < share] = 0
    small = fit_target(depth, size, "crop", missing=True)
    readings = small[small > 0]
    if readings.size:
        assert readings.min() >= depth[depth > 0].min()
        assert readings.max() <= depth.max()


def test_area_mean_of_a_flat_wall_with_a_hole_is_the_wall() -> None:
    wall = np.full((64, 64), 2345, np.uint16)
    wall[:20, :20] = 0
    small = fit_target(wall, 16, "crop", missing=True)
    assert set(np.unique(small)) == {0, 2345}
    assert (small[:5, :5] == 0).all()
    assert small[5, 5] == 2345


def test_channels_are_resampled_one_by_one() -> None:
    image = np.stack([np.full((32, 32), 10 * c, np.uint8) for c in range(4)], axis=2)
    small = fit_target(image, 16, "crop", missing=False)
    assert small.shape == (16, 16, 4)
    assert small[3, 3].tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("content", "name", "dtype", "shape"),
    [
        (encoded(DEPTH), "a.png", "uint16", (48, 64)),
        (encoded(DEPTH.astype(np.uint8)), "a.png", "uint8", (48, 64)),
        (tiff(DEPTH), "a.tiff", "uint16", (48, 64)),
        (tiff(DEPTH / np.float32(1000)), "a.tiff", "float32", (48, 64)),
        (tiff(np.zeros((8, 9, 4), np.uint16), photometric="rgb"), "a.tiff", "uint16", (8, 9, 4)),
        (npy(DEPTH.astype(np.float64)), "a.npy", "float32", (48, 64)),
        (npy(DEPTH.astype(np.int32)), "a.npy", "uint16", (48, 64)),
    ],
)
def test_all_kinds_of_target_files_are_read(
    content: bytes, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    read = decode_target(content, name)
    assert read.dtype == np.dtype(dtype)
    assert read.shape == shape


def test_rgb_images_may_be_arrays() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decode_rgb(npy(rgb), "x.npy")), rgb)


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (b"", "x.png", "empty"),
        (b"no image", "x.png", "cannot be read as an image: its content is of no known kind"),
        (encoded(DEPTH), "x.png", "are RGB and target swapped"),
        (npy(DEPTH), "x.npy", "has 1 channel.*are RGB and target swapped"),
        (npy(np.zeros((8, 8, 3))), "x.npy", "values of type float64"),
        (npy(np.zeros((8, 8, 3), np.int8)), "x.npy", "values of type int8, expected .* .uint8"),
        (npy(np.zeros((8, 8, 3), np.bool_)), "x.npy", "values of type bool"),
        (npy(np.zeros((1, 8, 8, 3), np.uint8)), "x.npy", r"shape \(1, 8, 8, 3\), expected"),
        (npy(np.zeros((3, 8, 8), np.uint8)), "x.npy", r"shape \(3, 8, 8\), expected"),
        (npy(np.zeros((), np.uint8)), "x.npy", r"shape \(\), expected"),
        (tiff(np.zeros((8, 8, 3), np.uint16), photometric="rgb"), "x.tiff", "of type uint16"),
        (encoded(np.zeros((8, 8, 3), np.uint8))[:-20], "x.png", "damaged or cut off"),
    ],
)
def test_wrong_rgb_files_are_told_by_name(content: bytes, name: str, told: str) -> None:
    with pytest.raises(DataError, match=rf"x\.\w+.*{told}"):
        decode_rgb(content, name)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda upright: upright),
        (2, lambda upright: upright[:, ::-1]),
        (3, lambda upright: upright[::-1, ::-1]),
        (6, lambda upright: np.rot90(upright)),
        (8, lambda upright: np.rot90(upright, -1)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_images_are_turned_as_exif_says(
    orientation: int, turn: Callable[[NDArray[Any]], NDArray[Any]], kind: str
) -> None:
    upright = np.random.default_rng(1).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored = Image.fromarray(np.ascontiguousarray(turn(upright)))
    stored.save(file, kind, exif=exif, lossless=True)
    for decode in (decode_rgb, decode_target):
        np.testing.assert_array_equal(np.asarray(decode(file.getvalue(), "x")), upright)


@pytest.mark.parametrize(
    "tag",
    [
        (282, 2, 3, b"72\0\0"),  # XResolution as text
        (256, 2, 3, b"60\0\0"),  # ImageWidth as text
        (258, 8, 1, struct.pack("<hh", -1, 0)),  # BitsPerSample below 0
        (296, 7, 1, b"\2\0\0\0"),  # ResolutionUnit as bytes
    ],
)
def test_photographs_with_odd_exif_tags_are_turned_too(tag: tuple[int, int, int, bytes]) -> None:
    tags = ((0x0112, 3, 1, struct.pack("<HH", 6, 0)), tag)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags))
    exif += b"".join(struct.pack("<HHI4s", *each) for each in tags) + bytes(4)
    file = io.BytesIO()
    Image.fromarray(DEPTH.astype(np.uint8)).convert("RGB").save(file, "JPEG", exif=exif)
    assert decode_rgb(file.getvalue(), "a.jpg").size == (48, 64)
    assert decode_target(file.getvalue(), "a.jpg").shape == (64, 48, 3)


def test_huge_images_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(DataError, match="max_pixels"):
        decode_rgb(encoded(np.zeros((40, 50, 3), np.uint8)), "big.png", 0, 1999)
    with pytest.raises(DataError, match=r"big\.npy"):
        decode_target(npy(np.zeros((100, 100))), "big.npy", 999)
    header = {"descr": "|u1", "fortran_order": False, "shape": (100_000, 100_000)}
    first, second = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(first, header)
    np.lib.format.write_array_header_2_0(second, header)
    third = second.getvalue().replace(b"NUMPY\2", b"NUMPY\3")
    for content in (first.getvalue(), second.getvalue(), third):
        for decode in (decode_rgb, decode_target):
            with pytest.raises(DataError, match=r"100000 x 100000 pixels.*prepare\.max_pixels"):
                decode(content, "big.npy")
    with pytest.raises(DataError, match=r"big\.npy is damaged or cut off"):
        decode_target(first.getvalue().replace(b"100000, 100000", b"1, 1, 99999999"), "big.npy")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_limit_of_pixels_is_ours_and_not_pillows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # twice as many are an error
    content = encoded(np.zeros((40, 50, 3), np.uint8), kind)
    assert decode_rgb(content, "big.png", 0, 2000).size == (50, 40)
    with pytest.raises(DataError, match=r"50 x 40 pixels, more than prepare.max_pixels = 1,999"):
        decode_rgb(content, "big.png", 0, 1999)
    assert Image.MAX_IMAGE_PIXELS == 900


def test_flipped_bits_in_png_pixels_are_noticed() -> None:
    whole = encoded(DEPTH)
    for position in range(60, len(whole) - 20, 97):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        with pytest.raises(DataError, match=r"d\.png"):
            decode_target(bytes(damaged), "d.png")


def test_metres_become_millimetres_and_nonsense_no_reading() -> None:
    metres = np.array([[1.2345, 0, -1, np.nan, np.inf, 70]], np.float32)
    assert to_millimetres(metres, 1000.0, "m.npy").tolist() == [[1234, 0, 0, 0, 0, 0]]
    with pytest.raises(DataError, match=r"m\.npy has a median depth of 2,000"):
        to_millimetres(np.full((2, 2), 2000.0), 1000.0, "m.npy")


@pytest.mark.parametrize("scale", [0.1, 0.2, 0.25, 0.5, 2.5, 5, 1000 / 256])
def test_depth_is_multiplied_by_its_scale_and_rounded(scale: float) -> None:
    every = np.arange(16_000, dtype=np.uint16).reshape(100, 160)
    sensor = Sensor("depth", "auto", "uint16", 1, 30, "crop", scale=scale)
    wanted = np.rint(every * float(scale))
    wanted[wanted > 65535] = 0
    np.testing.assert_array_equal(sensor.convert(every, "d.png"), wanted)


def test_each_channel_has_its_own_median_which_is_one_of_its_values() -> None:
    image = np.array([[[1, 10], [0, 20]], [[4, 0], [9, 30]]], np.uint8)
    once = as_image_values(image, "a", [0], missing=False)
    assert once.tolist() == [[[1, 10], [4, 20]], [[4, 20], [9, 30]]]
    once = as_image_values(np.array([[4, 6, 5]], np.uint8), "a", [5], missing=False)
    assert once.tolist() == [[4, 6, 4]]
    empty = np.full((2, 2), np.nan, np.float32)
    assert not as_image_values(empty, "a", missing=False).any()
    assert as_image_values(np.array([[-1, 7, 9]]), "a", [-1], missing=False).tolist() == [[7, 7, 9]]


def test_own_values_are_converted_by_modality_and_unit() -> None:
    def convert(modality: str, unit: str, values: NDArray[Any], dtype: str = "") -> NDArray[Any]:
        return Sensor(modality, unit, dtype, int(bool(dtype)), 1, "crop").convert(values, "f")

    metres = np.array([[1.5]], np.float32)
    assert convert("depth", "auto", metres)[0, 0] == 1500
    assert convert("depth", "mm", metres * 1000)[0, 0] == 1500
    assert convert("thermal", "auto", np.array([[0.5]], "f4"))[0, 0] == 32768
    assert convert("thermal", "raw", np.array([[300.4]], "f4"))[0, 0] == 300
    with pytest.raises(DataError, match="depth of 8 bit"):
        convert("depth", "auto", np.zeros((2, 2), np.uint8))
    with pytest.raises(DataError, match="is it an RGB image"):
        convert("depth", "auto", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(
        DataError, match="1 channel of uint16, expected 1 of uint8: all target images must be alike"
    ):
        convert("nir", "auto", np.zeros((2, 2), np.uint16), "uint8")
    with pytest.raises(DataError, match="3 channels of uint8, expected 1: all target images"):
        Sensor("nir", "auto", "", 1, 1, "crop").convert(np.zeros((2, 2, 3), np.uint8), "f")


def test_threads_that_read_images_leave_the_warnings_alone() -> None:
    odd, before = io.BytesIO(), warnings.filters[:]
    Image.fromarray(DEPTH.astype(np.uint8)).save(odd, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff")
    with ThreadPoolExecutor(8) as pool:
        for image in pool.map(lambda _: decode_target(odd.getvalue(), "odd.jpg"), range(200)):
            assert image.shape == DEPTH.shape
    assert warnings.filters == before


def test_threads_hear_of_damage_in_their_own_images_alone() -> None:
    whole = tiff(DEPTH)
    damaged = whole.replace(struct.pack("<HH", 296, 3), struct.pack("<HH", 296, 99))

    def read(content: bytes) -> bool:
        try:
            return decode_target(content, "d.tif").shape == DEPTH.shape
        except DataError:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(read, [whole, damaged] * 50)] == [True, False] * 50


def test_thermal_images_are_not_called_depth() -> None:
    with pytest.raises(
        DataError, match=r"measures no depth, set folders.modality=thermal.*unit=raw"
    ):
        Sensor("depth", "auto", "", 0, 48, "crop").decode(encoded(DEPTH.astype(np.uint8)), "t.png")
