"""Tiny archives in the official layouts, with pictures that tell their own name and orientation."""

from __future__ import annotations

import csv
import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from sfkt_cli.settings.config import Config, build

HEIGHT, WIDTH = 30, 40


def scene(number: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """An RGB picture (height, width, 3): red rises to the right, green downwards, blue is noise."""
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[:, :, 0] = np.linspace(20, 220, width)[None]
    rgb[:, :, 1] = np.linspace(20, 220, height)[:, None]
    rgb[:, :, 2] = np.random.default_rng(number).integers(0, 255, (height, width))
    return rgb


def depth(number: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint16]:
    """Millimetres (height, width): farther downwards, with a hole at the upper left."""
    depth_mm = np.linspace(1000, 3000, height)[:, None] + np.arange(width)[None] + number
    depth_mm[:4, :4] = 0
    return depth_mm.astype(np.uint16)


def save(path: Path, pixels: NDArray[np.generic]) -> None:
    """Write an image file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def encoded(pixels: NDArray[Any], kind: str = "PNG", **how: Any) -> bytes:
    """An image file as Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


def tiff(pixels: NDArray[Any], **how: Any) -> bytes:
    """A TIFF file; several channels that come last need a photometric."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **{"photometric": "minisblack", "metadata": None} | how)
    return file.getvalue()


def npy(values: NDArray[Any]) -> bytes:
    """A NumPy file."""
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def zipped(root: Path, top: str = "") -> Path:
    """A zip file of a folder, beside it; ``top`` goes before all names."""
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, top + str(file.relative_to(root)))
    return path


def settings_of(name: str, root: Path, **over: Any) -> Config:
    """What prepares the data set ``name`` in ``root``, at 30 pixels unless ``over`` says other."""
    return build({"dataset": name, "image_size": HEIGHT, "prepare": {"root": str(root)}}, over)


def rgb_nir(root: Path, count: int = 4) -> Path:
    """nirscene1 with ``count`` pairs in each of its nine classes."""
    names = [
        "country",
        "field",
        "forest",
        "indoor",
        "mountain",
        "oldbuilding",
        "street",
        "urban",
        "water",
    ]
    for place, label in enumerate(names):
        for number in range(count):
            picture = scene(100 * place + number)
            stem = root / "nirscene1" / label / f"{2 * number:04d}"
            save(Path(f"{stem}_rgb.tiff"), picture)
            save(Path(f"{stem}_nir.tiff"), picture[:, :, 2])
    return root


def nyu_depth(root: Path, count: int = 24, chunks: bool = True) -> Path:
    """The labelled .mat file with ``count`` images of six scenes and splits of the same layout."""
    root.mkdir(parents=True, exist_ok=True)
    types = ["bathroom", "bedroom", "kitchen", "cafe", "study", "foyer"]
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        images = np.stack([scene(n).T for n in range(count)])
        metres = np.stack([depth(n).T / np.float32(1000) for n in range(count)])
        layout = {"chunks": True, "compression": "gzip"} if chunks else {}
        file.create_dataset("images", data=images, **layout)
        file.create_dataset("depths", data=np.maximum(metres, 0.5).astype("f4"), **layout)
        file.create_dataset("rawDepths", data=metres.astype("f4"), **layout)
        kinds = [types[n % 6] for n in range(count)]
        places = [f"{kind}_{n // 12:04d}" for n, kind in enumerate(kinds)]
        for name, texts in (("sceneTypes", kinds), ("scenes", places)):
            references = file.create_dataset(name, (1, count), h5py.ref_dtype)
            for index, text in enumerate(texts):
                codes = np.array([[ord(letter)] for letter in text], np.uint16)
                cell = file.create_dataset(f"#refs#/{name}{index}", data=codes)
                references[0, index] = cell.ref
    return root


def nyu_splits(root: Path, held_out: Iterable[int]) -> Path:
    """splits.mat, a MATLAB file of version 5 with one compressed vector."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    numbers = np.array(sorted(held_out), "<f8").tobytes()
    matrix = element(6, struct.pack("<II", 6, 0)) + element(
        5, struct.pack("<ii", len(numbers) // 8, 1)
    )
    matrix += element(1, b"testNdxs") + element(9, numbers)
    packed = zlib.compress(element(14, matrix))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    path = root / "splits.mat"
    path.write_bytes(header + struct.pack("<II", 15, len(packed)) + packed)
    return path


def rotate(depth_mm: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Millimetres as SUN RGB-D stores them."""
    return ((depth_mm << 3) | (depth_mm >> 13)).astype(np.uint16)


def sun_rgbd(root: Path, count: int = 4) -> Path:
    """SUNRGBD with all folders, common words ``office`` and ``bedroom``, own words, and idk."""
    folders = {
        "kv1/NYUdata": "NYU{:04d}",
        "kv1/b3dodata": "img_{:04d}",
        "kv2/kinect2data": "{0:06d}_{1:%Y-%m-%d_%H-%M-%S}_260595134347_rgbf000103-resize",
        "kv2/align_kv2": "{1:%Y-%m-%d_%H-%M-%S}_260595134347",
        "realsense/sa": "{1:%Y_%m_%d-%H_%M_%S}-1311000073",
        "xtion/xtion_align_data": "{1:%Y_%m_%d_%H_%M_%S}",
        "xtion/sun3ddata/home_{0}/scan1": "{0:07d}-000003653244",
    }
    number = 0
    for place, (folder, pattern) in enumerate(folders.items()):
        own = [f"own_{folder.split('/')[0]}", "idk" if place == 0 else "lab"]
        for word in ["office", "bedroom"] * count + own:
            number += 1
            name = pattern.format(number, datetime(2014, 12, 18) + number * timedelta(minutes=5))
            capture = root / "SUNRGBD" / folder.format(number) / name
            save(capture / "image" / f"pic{number}.jpg", scene(number))
            save(capture / "depth" / f"pic{number}_abs.png", rotate(depth(number)))
            save(capture / "depth_bfx" / f"pic{number}_abs.png", rotate(depth(number)))
            (capture / "scene.txt").write_text(f"{word}\n", encoding="utf-8")
            (capture / "intrinsics.txt").write_text("520 0 320\n", encoding="utf-8")
    return root


def washington(root: Path) -> Path:
    """rgbd-dataset with five categories, three instances and two frames each."""
    for label in ("apple", "bowl", "cap", "soda_can", "toothbrush"):
        for instance in (1, 2, 3):
            for frame in (1, 2):
                name = f"{label}_{instance}"
                stem = root / "rgbd-dataset" / label / name / f"{name}_1_{frame}"
                mask = np.zeros((HEIGHT, WIDTH), bool)
                mask[6:24, 8:32] = True
                save(Path(f"{stem}_crop.png"), scene(frame))
                save(Path(f"{stem}_depthcrop.png"), depth(frame))
                Image.fromarray(mask).save(f"{stem}_maskcrop.png")
                Path(f"{stem}_loc.txt").write_text("10,20\n", encoding="utf-8")
    return root


def diml_sample(root: Path) -> Path:
    """The sample set, LR, with messy scene folders in both folds."""
    scenes = ("04. Church", "03_claseeroom_1", "12_livingroom_2", "07. Library", "16.03.02")
    for fold in ("train", "test"):
        for label in scenes:
            for number in range(4):
                folder = root / "indoor" / fold / "LR" / label
                stem = f"in_{fold}_{label[:2]}_{number}_{number:06d}"
                save(folder / "color" / f"{stem}_c.png", scene(number))
                save(folder / "depth_filled" / f"{stem}_depth_filled.png", depth(number))
    return root


def diml_full(root: Path) -> Path:
    """The full set's layout."""
    for label in ("01. Warehouse", "02. Cafe", "05. Bathroom", "13. kitchen"):
        for take in (1, 2, 3):
            for number in range(2):
                folder = root / label / "17.03.28" / str(take)
                save(folder / "col" / f"{number}_c.png", scene(number))
                save(folder / "up_png" / f"{number}_ud.png", depth(number))
                save(folder / "warp_png" / f"{number}_wd.png", depth(number))
                save(folder / "raw_png" / f"{number}_rd.png", depth(number, 10, 12))
    return root


def folders(root: Path, labels: Iterable[str] = ("mug", "pot"), suffix: str = ".png") -> Path:
    """One's own data, with pairs of the classes in ``labels`` and unlabelled TI pairs."""
    for place, label in enumerate(labels):
        for number in range(6):
            save(root / "tr" / label / "rgb" / f"{number}.jpg", scene(10 * place + number))
            save(root / "tr" / label / "target" / f"{number}{suffix}", depth(number))
    for number in range(6):
        save(root / "ti" / "rgb" / f"{number}.jpg", scene(90 + number))
        save(root / "ti" / "target" / f"{number}{suffix}", depth(number))
    return root


def manifest(root: Path) -> Path:
    """One's own data as manifest.csv."""
    rows = []
    for number in range(12):
        rgb, target = f"img/{number} ä.jpg", f"depth/{number}.png"
        save(root / rgb, scene(number))
        save(root / target, depth(number))
        label = ("mug", "pot", "")[number % 3]
        role = "" if label else "ti"
        rows.append((rgb, target, label, role, f"room{number // 3}"))
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("rgb", "target", "label", "role", "group"))
        writer.writerows(rows)
    return root


MAKERS = {
    "rgb-nir": rgb_nir,
    "nyu-depth": nyu_depth,
    "sun-rgbd": sun_rgbd,
    "washington-rgbd": washington,
    "diml-rgbd": diml_sample,
    "folders": folders,
}
"""One official layout for each reader."""
