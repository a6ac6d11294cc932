"""Encodings: from stored values to model input, against loops and known surfaces."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sfkt_cli.data.images import (
    DEPTH_ONLY,
    KINECT_FOCAL,
    LAMPS,
    Encoding,
    as_rgb,
    choose_encoding,
    encode,
    rgb_to_float,
)
from sfkt_cli.errors import ConfigError
from sfkt_cli.settings.config import EncodingKind, build

KINDS = get_args(EncodingKind)


def encoding(kind: Any, channels: int = 1, low: float = 500.0, high: float = 4000.0) -> Encoding:
    return Encoding(kind, low, high, channels, missing=kind in DEPTH_ONLY)


def depth_images(seed: int, count: int = 3, size: int = 12) -> NDArray[np.uint16]:
    """Slopes with noise, holes, and values at both ends of the range."""
    random = np.random.default_rng(seed)
    slope = random.uniform(-60, 60, (2, count, 1, 1))
    rows, columns = np.mgrid[:size, :size]
    depth = 2500 + slope[0] * rows + slope[1] * columns + random.normal(0, 20, (count, size, size))
    depth[random.random(depth.shape) < 0.1] = 0
    depth[0, 0, :2] = [1, 65535]
    return np.asarray(depth.clip(0, 65535), np.uint16)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(KINDS))
def test_values_are_in_range_and_missing_depth_has_one_value(seed: int, kind: str) -> None:
    stored = depth_images(seed)
    seen = encode(torch.from_numpy(stored), encoding(kind))
    assert seen.dtype == torch.float32
    assert seen.shape == (3, encoding(kind).encoded_channels, 12, 12)
    assert torch.isfinite(seen).all()
    assert seen.min() >= 0
    assert seen.max() <= 1
    if kind in DEPTH_ONLY:
        hidden = torch.from_numpy(stored == 0).unsqueeze(1).expand_as(seen)
        assert (seen[hidden] == (0.5 if kind == "shading" else 0.0)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 1, 65535])
def test_flat_and_empty_images_are_finite(kind: str, value: int) -> None:
    seen = encode(torch.full((2, 8, 8), value, dtype=torch.uint16), encoding(kind))
    assert torch.isfinite(seen).all()
    assert seen.min() >= 0
    assert seen.max() <= 1


@pytest.mark.parametrize("kind", ["window", "linear"])
def test_window_equals_a_loop(kind: str) -> None:
    stored = depth_images(4)
    seen = encode(torch.from_numpy(stored), encoding(kind))
    for b, y, x in np.ndindex(stored.shape):
        expected = min(max((int(stored[b, y, x]) - 500) / 3500, 0), 1)
        assert float(seen[b, 0, y, x]) == pytest.approx(expected, abs=1e-6)


def test_colormap_goes_from_blue_to_red_and_shows_no_reading_as_black() -> None:
    stored = torch.tensor([[[500, 1375, 2250, 3125, 4000, 0, 65535]]], dtype=torch.uint16)
    seen = encode(stored, encoding("colormap"))[0, :, 0].T
    expected = [
        [0.0, 0.0, 0.5],
        [0.0, 0.5, 1.0],
        [0.5, 1.0, 0.5],
        [1.0, 0.5, 0.0],
        [0.5, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.5, 0.0, 0.0],
    ]
    torch.testing.assert_close(seen, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["relative", "standardised"])
def test_relative_equals_a_loop_over_each_image(kind: str) -> None:
    stored = depth_images(5)
    seen = encode(torch.from_numpy(stored), encoding(kind))
    for b in range(len(stored)):
        values = [int(v) for v in stored[b].ravel() if v > 0 or kind == "standardised"]
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        for y, x in np.ndindex(stored.shape[1:]):
            value = int(stored[b, y, x])
            expected = min(max((value - mean + 2 * deviation) / (4 * deviation), 0), 1)
            if kind == "relative" and value == 0:
                expected = 0
            assert float(seen[b, 0, y, x]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["relative", "standardised"])
@pytest.mark.parametrize(("offset", "scale"), [(700, 1), (0, 3), (250, 2)])
def test_relative_does_not_see_offset_and_scale(kind: str, offset: int, scale: int) -> None:
    random = np.random.default_rng(0)
    stored = torch.from_numpy(random.integers(1000, 3000, (2, 10, 10)))
    first = encode(stored, encoding(kind))
    torch.testing.assert_close(
        encode(scale * stored + offset, encoding(kind)), first, rtol=0, atol=1e-4
    )
    assert first.std() > 0.1


def plane(normal: NDArray[np.float64], size: int = 24, away_mm: float = 2500.0) -> Tensor:
    """Depth of the plane through (0, 0, away) with that normal; x right, y down, z away."""
    focal = KINECT_FOCAL * size
    across = (np.arange(size) - (size - 1) / 2) / focal
    rays = np.stack(np.broadcast_arrays(across[None, :], across[:, None], 1.0))
    depth = away_mm * normal[2] / np.tensordot(normal, rays, axes=1)
    return torch.from_numpy(depth[None])


@pytest.mark.parametrize("toward", [(0, 0, -1), (0.5, 0, -1), (0, -0.4, -1), (-0.3, 0.35, -1)])
def test_normals_of_a_plane_are_its_normal_towards_the_camera(
    toward: tuple[float, float, float],
) -> None:
    normal = np.array(toward) / np.linalg.norm(toward)
    seen = encode(plane(normal), encoding("normals"))[0, :, 3:-3, 3:-3]
    shown = normal * [1, 1, -1]  # x right, y down, z to the camera
    expected = torch.tensor(0.5 + 0.5 * shown, dtype=torch.float32).view(3, 1, 1)
    torch.testing.assert_close(seen, expected.expand_as(seen), rtol=0, atol=0.02)


def test_normals_are_cross_products_of_differences_of_points() -> None:
    stored = np.random.default_rng(0).integers(900, 1100, (1, 5, 7))
    stored[0, 2, 3] = 0
    edge = np.pad(stored, ((0, 0), (1, 1), (1, 1)))[0].astype(float)
    focal = KINECT_FOCAL * 7
    points = np.zeros((5, 7, 3))
    for y, x in np.ndindex(5, 7):
        around = edge[y : y + 3, x : x + 3]
        depth = around[around > 0].mean()
        points[y, x] = depth * np.array([(x - 3) / focal, (y - 2) / focal, 1.0])
    points = np.pad(points, ((1, 1), (1, 1), (0, 0)), mode="edge")
    seen = encode(torch.from_numpy(stored), encoding("normals"))[0]
    for y, x in np.ndindex(5, 7):
        right = points[y + 1, x + 2] - points[y + 1, x]
        down = points[y + 2, x + 1] - points[y, x + 1]
        normal = np.cross(right, down)
        normal *= -np.sign(normal[2]) / np.linalg.norm(normal)
        expected = (0.5 + 0.5 * normal * [1, 1, -1]) * (stored[0, y, x] > 0)
        np.testing.assert_allclose(seen[:, y, x].numpy(), expected, atol=1e-4)


def test_shading_is_lamberts_law_on_the_normals_each_lamp_with_its_own_exposure() -> None:
    stored = torch.from_numpy(depth_images(7))
    normals = encode(stored, encoding("normals"))
    seen = encode(stored, encoding("shading"))
    for b, (channel, lamp) in product(range(len(stored)), enumerate(LAMPS)):
        there = stored[b].numpy() > 0
        turned = 2.0 * normals[b].numpy() - 1.0
        facing = sum(n * part for n, part in zip(turned, lamp, strict=True)).clip(0.0)
        mean, deviation = facing[there].mean(), facing[there].std()
        expected = np.where(there, 0.5 + 0.25 * (facing - mean) / deviation, 0.5).clip(0.0, 1.0)
        np.testing.assert_allclose(seen[b, channel].numpy(), expected, atol=1e-4)
    assert all(sum(part * part for part in lamp) == pytest.approx(1.0) for lamp in LAMPS)


def test_the_light_comes_from_above() -> None:
    room = plane(np.array((0.0, 0.0, -1.0)))  # a wall, with a ceiling above and a floor below
    room[:, :8] = plane(np.array((0.0, 0.8, -0.6)))[:, :8]
    room[:, 16:] = plane(np.array((0.0, -0.8, -0.6)))[:, 16:]
    seen = encode(room, encoding("shading"))[0, :, :, 3:-3]
    ceiling, wall, floor = (seen[:, rows].mean() for rows in (slice(2, 6), 12, slice(18, 22)))
    assert floor > wall > ceiling


def test_mirrored_depth_is_lit_by_the_lamps_of_the_other_side() -> None:
    stored = torch.from_numpy(depth_images(9))
    seen = encode(stored, encoding("shading"))
    mirrored = encode(stored.flip(2), encoding("shading")).flip(3)
    torch.testing.assert_close(mirrored, seen.flip(1), rtol=0, atol=1e-5)


def test_mirrored_depth_gives_mirrored_normals_with_x_turned_round() -> None:
    stored = torch.from_numpy(depth_images(8, size=17).astype(np.int32))
    seen = encode(stored, encoding("normals"))
    mirrored = encode(stored.flip(2), encoding("normals")).flip(3)
    valid = (stored > 0).unsqueeze(1)
    turned = torch.cat([1 - seen[:, :1], seen[:, 1:]], dim=1) * valid
    torch.testing.assert_close(mirrored, turned, rtol=0, atol=2e-3)


def test_hha_of_a_slope_and_of_a_wall() -> None:
    upward = np.array([0.0, -0.6, -1.0]) / np.hypot(0.6, 1)
    slope = encode(plane(upward), encoding("hha"))[0, :, 4:-4, 4:-4]
    wall = encode(plane(np.array([0.0, 0.0, -1.0])), encoding("hha"))[0, :, 4:-4, 4:-4]
    tilt = float(np.arccos(0.6 / np.hypot(0.6, 1)) / np.pi)
    torch.testing.assert_close(slope[2], torch.full_like(slope[2], tilt), rtol=0, atol=0.03)
    torch.testing.assert_close(wall[2], torch.full_like(wall[2], 0.5), rtol=0, atol=0.02)
    torch.testing.assert_close(wall[0], torch.full_like(wall[0], 500 / 2500), rtol=0, atol=1e-4)
    heights = wall[1].mean(dim=1)
    assert (heights[:-1] > heights[1:]).all()  # rows go down


@pytest.mark.parametrize("kind", ["window", "relative", "linear", "standardised"])
def test_stored_channels_stay_apart(kind: str) -> None:
    random = np.random.default_rng(2)
    stored = torch.from_numpy(random.integers(600, 3000, (2, 6, 7, 4)))
    seen = encode(stored, encoding(kind, channels=4))
    assert seen.shape == (2, 4, 6, 7)
    assert encoding(kind, channels=4).encoded_channels == 4
    if kind in ("window", "linear"):
        for channel in range(4):
            alone = encode(stored[..., channel], encoding(kind))
            torch.testing.assert_close(seen[:, channel : channel + 1], alone)


def test_rgb_to_float_and_three_channels_for_an_rgb_model() -> None:
    rgb = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).view(2, 3, 4, 3)
    seen = rgb_to_float(rgb)
    assert seen.shape == (2, 3, 3, 4)
    for b, y, x, c in np.ndindex(2, 3, 4, 3):
        assert float(seen[b, c, y, x]) == pytest.approx(int(rgb[b, y, x, c]) / 255)
    assert rgb_to_float(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)).max() == 1
    one = torch.rand(2, 1, 3, 4)
    assert torch.equal(as_rgb(one), torch.cat([one, one, one], dim=1))
    four = torch.rand(2, 4, 3, 4)
    assert torch.equal(as_rgb(four), four[:, :3])
    assert as_rgb(torch.rand(2, 2, 3, 4)).shape == (2, 3, 3, 4)


def test_the_window_is_measured_on_valid_values() -> None:
    depth = np.zeros((4, 10, 10), np.uint16)
    depth[:, 5:] = np.linspace(1000, 3000, 200).reshape(4, 5, 10)
    chosen = choose_encoding("window", "depth", depth)
    values = depth[depth > 0]
    assert chosen.low == pytest.approx(np.percentile(values, 1))
    assert chosen.high == pytest.approx(np.percentile(values, 99))
    assert chosen.missing
    nir = choose_encoding("auto", "nir", depth)
    assert nir.kind == "linear"
    assert nir.low == 0
    assert not nir.missing
    eight_bit = choose_encoding("linear", "nir", depth.astype(np.uint8))
    assert (eight_bit.low, eight_bit.high) == (0, 255)
    empty = choose_encoding("window", "depth", np.zeros((2, 4, 4), np.uint16))
    assert empty.high > empty.low
    flat = choose_encoding("window", "depth", np.full((2, 4, 4), 700, np.uint16))
    assert flat.high > flat.low


@pytest.mark.parametrize("modality", ["depth", "nir", "thermal", "other"])
def test_every_modality_has_a_default_and_names_what_fits(modality: str) -> None:
    sample = np.full((2, 4, 4), 700, np.uint16)
    assert choose_encoding("auto", modality, sample).kind in KINDS
    for kind in KINDS:
        if (kind in DEPTH_ONLY) == (modality == "depth"):
            assert choose_encoding(kind, modality, sample).kind == kind
        else:
            with pytest.raises(ConfigError) as caught:
                choose_encoding(kind, modality, sample)
            assert kind in str(caught.value)
            assert modality in str(caught.value)


def test_unfit_encodings_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        choose_encoding("rainbow", "depth", np.ones((2, 4, 4), np.uint16))
    with pytest.raises(ConfigError, match="one channel"):
        choose_encoding("normals", "depth", np.ones((2, 4, 4, 2), np.uint16))
    two = choose_encoding("window", "depth", np.ones((2, 4, 4, 2), np.uint16))
    assert two.channels == two.encoded_channels == 2


def test_an_encoding_travels_as_plain_values() -> None:
    chosen = choose_encoding("window", "depth", depth_images(0))
    assert Encoding(**asdict(chosen)) == chosen


def test_the_earlier_name_of_an_encoding_is_taken() -> None:
    assert build({"encoding": "percentile"}).encoding == "standardised"
    with pytest.raises(ConfigError, match="encoding = \\['percentile'\\]"):
        build({"encoding": ["percentile"]})
