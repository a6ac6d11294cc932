"""What does not fit the settings is told before anything is trained on it, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sfkt_cli.data.images import choose_encoding, encode
from sfkt_cli.data.readers import read_archive
from sfkt_cli.data.sensor import Sensor, prepared_sensor
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config
from sfkt_cli.settings.runs import Run
from sfkt_cli.stages.prepare import prepare
from tests.data.make_archives import save, scene, settings_of
from tests.data.test_readers import SHARED

Pixels = NDArray[Any]
Change = Callable[[Pixels], Pixels]
WARM = 29_500 + 90 * np.sin(np.arange(48)[:, None] / 7 + np.arange(64) / 9)
"""A thermal image in hundredths of a kelvin."""


def bordered(image: Pixels, value: float = 0) -> Pixels:
    image = image.copy()
    image[:, :12] = value
    image[30, 40] = value
    return image


def recorded(root: Path, image: Pixels) -> Path:
    """Pairs and target images, all the same."""
    for number in range(5):
        save(root / f"ti/rgb/{number}.jpg", scene(number, 48, 64))
        for place in ("ti/target", "tr/target"):
            (root / place).mkdir(parents=True, exist_ok=True)
            np.save(root / f"{place}/{number}.npy", image)
    return root


def thermal(root: Path, **own: Any) -> Config:
    own = {"modality": "thermal"} | own
    return settings_of("folders", root, image_size=48, folders=own)


def contrast(stored: Pixels) -> float:
    """Of the model input, from the 5th to the 95th percentile of the scene."""
    image = stored[None].copy()
    seen = encode(torch.from_numpy(image), choose_encoding("auto", "thermal", image))
    low, high = torch.quantile(seen[0, 0, :, 12:], torch.tensor([0.05, 0.95]))
    return float(high - low)


@pytest.mark.parametrize("value", [0, 65535])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_border_that_takes_the_contrast_is_told_and_mended(
    value: int, dtype: str, tmp_path: Path
) -> None:
    unit = "raw" if dtype == "float32" else "auto"
    image = bordered(WARM, value).astype(dtype)
    root = recorded(tmp_path / "mine", image)
    archive = read_archive(thermal(root, unit=unit))
    (told,) = archive.notes
    assert f"ti/target/0.npy is {value} in 18.78% of its pixels, far from the others" in told
    assert f"set folders.missing=[{value}] (5 of 5 images" in told
    assert contrast(archive.loader.target(archive.records[0])) < 0.03
    config = thermal(root, unit=unit, missing=[value])
    run = Run(tmp_path / "run")
    prepare(config, run)
    assert not read_archive(config).notes
    store = open_store(run.transfer_store)
    stored = store["target/target"][0]
    assert contrast(stored) > 0.5
    assert stored[5, 1] == np.rint(np.sort(image[image != value])[2494 // 2])
    sensor = prepared_sensor(run)
    exported = Sensor(**json.loads(json.dumps(asdict(sensor))))
    content = (root / "tr/target/0.npy").read_bytes()
    for own in (sensor, exported):
        np.testing.assert_array_equal(own.decode(content, "a.npy"), stored)
        np.testing.assert_array_equal(own.fit_values(image), stored)


@pytest.mark.parametrize("unit", ["raw", "auto"])
def test_pixels_without_a_value_do_not_take_the_contrast(unit: str, tmp_path: Path) -> None:
    image = (WARM if unit == "raw" else WARM / 65535).astype(np.float32)
    image[::9, ::7] = np.nan
    image[1, 1] = np.inf
    archive = read_archive(thermal(recorded(tmp_path, image), unit=unit))
    stored = archive.loader.target(archive.records[0])
    assert contrast(stored) > 0.5
    assert 29_400 < stored.min() <= stored.max() < 29_600
    assert not archive.notes
    sensor = Sensor("thermal", unit, "uint16", 1, 48, "crop")
    np.testing.assert_array_equal(sensor.fit_values(image), stored)


CELSIUS = (WARM / 100 - 273.15).astype(np.float32)
FAR = np.linspace(2, 100, 48 * 64, dtype=np.float32).reshape(48, 64)  # metres
KITTI = (FAR * 256).astype(np.uint16)
SKY = np.where(FAR > 90, 10000, FAR / 50).astype(np.float32)
ALPHA = np.stack([WARM, np.full((48, 64), 65535)], axis=2).astype(np.uint16)


@pytest.mark.parametrize(
    ("image", "own", "told"),
    [
        (CELSIUS, {"unit": "raw"}, "rounds: 3 different values are left; add an offset"),
        (WARM / 1e4, {"modality": "depth", "unit": "mm"}, "are they metres, folders.unit=m?"),
        (ALPHA, {}, "the last of 2 channels of 5 target images is 65535 everywhere"),
        (FAR, {"modality": "depth"}, "folders.scale=500 keeps them, in steps of 2 mm"),
        (FAR, {"modality": "depth", "unit": "m"}, "in steps of 2 mm, with folders.unit=auto"),
        (KITTI, {"modality": "depth", "scale": 1000 / 256}, "35.2 % of the readings of 5 depth"),
        (SKY, {"modality": "depth"}, "if 10000 stands for no reading"),
        (np.where(SKY > 9, np.finfo("f4").max, SKY), {"modality": "depth"}, "if 3.40282347e+38 st"),
    ],
)  # fmt: skip
def test_values_that_the_settings_lose_are_told(
    image: Pixels, own: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (note,) = read_archive(thermal(recorded(tmp_path, image), **own)).notes
    assert told in note


@pytest.mark.parametrize(
    ("image", "own"),
    [
        (FAR, {"modality": "depth", "scale": 500}),
        (SKY, {"modality": "depth", "missing": [10000.0]}),
        ((WARM / 65535).astype(np.float32), {"modality": "nir"}),
    ],
)
def test_what_was_advised_mends_it(image: Pixels, own: dict[str, Any], tmp_path: Path) -> None:
    archive = read_archive(thermal(recorded(tmp_path, image), **own))
    assert not archive.notes
    assert len(np.unique(archive.loader.target(archive.records[0]))) > 64


@pytest.mark.parametrize("unit", ["auto", "raw"])
def test_degrees_are_refused_with_an_advice_that_keeps_them(unit: str, tmp_path: Path) -> None:
    for dtype in ("float32", "int16"):
        root = recorded(tmp_path / dtype, (CELSIUS - 30).astype(dtype))
        with pytest.raises(DataError, match=r"hundredths of a kelvin.*folders\.missing"):
            read_archive(thermal(root, unit=unit))


def test_minus_one_is_no_reading_of_metres(tmp_path: Path) -> None:
    archive = read_archive(thermal(recorded(tmp_path, bordered(SKY / 9, -1)), modality="depth"))
    assert not any("largest value" in note for note in archive.notes)
    assert not archive.loader.target(archive.records[0])[:, :3].any()


@pytest.mark.parametrize("flir", [True, False])
@pytest.mark.parametrize("coloured", [True, False])
def test_false_colours_are_told(coloured: bool, flir: bool, tmp_path: Path) -> None:
    root = recorded(tmp_path, ALPHA)
    grey = np.stack([np.linspace(0, 255, 48 * 64).reshape(48, 64)] * 3, axis=2)
    if coloured:
        grey[:, :, 2] = 255 - grey[:, :, 2]
    for path in root.rglob("*.npy"):
        path.unlink()
        save(path.with_suffix(".jpg"), grey.astype(np.uint8))
        content, segment = path.with_suffix(".jpg").read_bytes(), b"FLIR\0\1\0\0FFF\0" + bytes(64)
        if flir:
            marker = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big")
            path.with_suffix(".jpg").write_bytes(content[:2] + marker + segment + content[2:])
    notes = read_archive(thermal(root)).notes
    assert len(notes) == coloured
    assert all(f"{root}/ti/target/0.jpg is coloured" in note for note in notes)
    assert all(("that this FLIR file holds" in note) == flir for note in notes)


@pytest.mark.parametrize(
    ("folder", "own"), [("msrs-thermal", {}), ("scans-rgbd", {"modality": "depth"})]
)
def test_nothing_is_told_of_good_images(folder: str, own: dict[str, Any]) -> None:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"no genuine files in {SHARED / folder}")
    assert not read_archive(thermal(SHARED / folder, **own)).notes
