"""A picture of pairs: RGB, target, and the target's edges in red over the RGB image.

A wrong partner, a shift or a turned image is seen at once: the red edges lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sfkt_cli.data.alignment import fill_holes
from sfkt_cli.data.store import Store
from sfkt_cli.files import replacing

TILE = 128
COLUMNS = 3
ROWS = 6
CAPTION = 14
EDGE_SHARE = 0.08
"""Share of pixels shown as edges."""
Picture = NDArray[np.uint8]


def draw_contact_sheet(store: Store, path: Path, names: Mapping[str, str] | None = None) -> bool:
    """Write a PNG with pairs of a store, or with target images where it has no pairs.

    ``names`` stand for ids; an id without a name is shown itself.

    Returns:
        False where the store has no images to show.
    """
    parts = [part for part in ("ti", "test", "target", "source") if store.count(part)]
    pairs = [p for p in parts if f"{p}/rgb" in store and f"{p}/target" in store]
    if not parts:
        return False
    part = (pairs or parts)[0]
    rows = np.unique(np.linspace(0, store.count(part) - 1, COLUMNS * ROWS).astype(int))
    ids = store.strings(f"{part}/id")
    strips = [
        ((names or {}).get(ids[row], ids[row]), _strip(store, part, int(row))) for row in rows
    ]
    width = max(strip.shape[1] for _, strip in strips) + 8
    height = TILE + CAPTION + 6
    lines = -(-len(strips) // COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(strips)), height * lines), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, strip) in enumerate(strips):
        left, upper = width * (index % COLUMNS), height * (index // COLUMNS)
        draw.text(
            (left + 2, upper + 1), name[:48].encode("ascii", "replace").decode(), fill="black"
        )
        sheet.paste(Image.fromarray(strip), (left, upper + CAPTION))
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")
    return True


def captioned(image: NDArray[Any], missing: bool, text: str) -> Image.Image:
    """A stored target image, enlarged, with a line of text below.

    ``missing``: whether 0 means "no reading".
    """
    picture = Image.fromarray(picture_of(image, missing))
    side = max(2 * TILE, picture.width)
    sheet = Image.new("RGB", (side, side + 2 * CAPTION), "white")
    sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST))
    ImageDraw.Draw(sheet).text(
        (6, side + 5), text, fill="black", font=ImageFont.load_default(CAPTION)
    )
    return sheet


def _strip(store: Store, part: str, row: int) -> Picture:
    rgb = store[f"{part}/rgb"][row] if f"{part}/rgb" in store else None
    target = store[f"{part}/target"][row] if f"{part}/target" in store else None
    tiles = []
    if rgb is not None:
        tiles.append(_enlarge(np.asarray(rgb)))
    if target is not None:
        plane = np.asarray(target if target.ndim == 2 else target[:, :, 0])
        tiles.append(_enlarge(_grey(plane, store.modality == "depth")))
        if rgb is not None:
            tiles.append(_enlarge(_overlay(np.asarray(rgb), plane, store.modality == "depth")))
    return np.concatenate(tiles, axis=1)


def picture_of(image: NDArray[Any], missing: bool) -> Picture:
    """A stored target image as people see it: (H, W, 3), grey or in its colours."""
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        return image
    return _grey(image if image.ndim == 2 else image[:, :, 0], missing)


def _enlarge(picture: Picture) -> Picture:
    image = Image.fromarray(picture)
    small = picture.shape[0] < TILE
    way = Image.Resampling.NEAREST if small else Image.Resampling.BOX
    return np.asarray(image.resize((TILE, TILE), way))


def _grey(plane: NDArray[np.generic], depth: bool) -> Picture:
    """Values between their 1st and 99th percentile as grey; missing depth as dark blue."""
    values = plane.astype(np.float32)
    valid = values > 0 if depth else np.ones_like(values, bool)
    low, high = np.percentile(values[valid], (1, 99)) if valid.any() else (0.0, 1.0)
    grey = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
    picture = np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    picture[~valid] = (20, 20, 90)
    return picture


def _overlay(rgb: Picture, plane: NDArray[np.generic], depth: bool) -> Picture:
    edges = np.hypot(*np.gradient(fill_holes(plane) if depth else plane.astype(np.float32)))
    threshold = np.quantile(edges, 1 - EDGE_SHARE)
    grey = rgb.mean(axis=2) * 0.6 + 80
    picture = np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    picture[edges > max(threshold, 1e-6)] = (230, 0, 0)
    return picture
