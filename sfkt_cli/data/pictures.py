"""Pictures of stored images; and do the two images of a pair show the same scene, pixel by pixel?

A contact sheet has RGB, target, and the target's edges in red over the RGB image: a wrong partner,
a shift or a turned image is seen at once, for the red edges lie elsewhere.

In numbers: the correlation of gradient magnitudes is higher for a true pair than for the same pair
shifted, mirrored or turned, and higher than for two images of different pairs. These controls are
made from the data itself, so no threshold depends on the sensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sfkt_cli.data.store import Store, spread
from sfkt_cli.files import replacing

TILE = 128
COLUMNS = 3
ROWS = 6
CAPTION = 14
EDGE_SHARE = 0.08  # share of pixels shown as edges
Picture = NDArray[np.uint8]
SIDE = 48  # images are compared at this size; finer detail differs between sensors anyway
MOST_PAIRS = 128
FEWEST_PAIRS = 8
CLEAR = 4.0  # standard errors that count as a difference
CLEAR_PEAK = 12.0  # likewise for the best of all shifts: chance gives the best of 2,304 about 4
MOST_UNLIKE = 0.09  # share of pairs that half of the others fit better; 0 to 5 % in good data
ENOUGH_PAIRS = 50  # for that share to say anything
Floats = NDArray[np.float32]
TURNS: dict[str, Callable[[Floats], Floats]] = {
    "mirrored": lambda maps: maps[:, :, ::-1],
    "upside down": lambda maps: maps[:, ::-1],
    "turned by 180 degrees": lambda maps: maps[:, ::-1, ::-1],
    "turned by 90 degrees": lambda maps: maps.transpose(0, 2, 1)[:, ::-1],
    "turned by 270 degrees": lambda maps: maps.transpose(0, 2, 1)[:, :, ::-1],
    "transposed": lambda maps: maps.transpose(0, 2, 1),
}


def draw_contact_sheet(store: Store, path: Path, names: Mapping[str, str] | None = None) -> bool:
    """Write a PNG with pairs of a store, or with target images; False where it has neither.

    ``names`` stand for ids; an id without a name is shown itself.
    """
    parts = [part for part in ("ti", "test", "target", "source") if store.count(part)]
    pairs = [p for p in parts if f"{p}/rgb" in store and f"{p}/target" in store]
    if not parts:
        return False
    part = (pairs or parts)[0]
    rows = spread(store.count(part), COLUMNS * ROWS).tolist()
    ids = store.strings(f"{part}/id")
    strips = [((names or {}).get(ids[row], ids[row]), _strip(store, part, row)) for row in rows]
    width = max(strip.shape[1] for _, strip in strips) + 8
    height = TILE + CAPTION + 6
    lines = -(-len(strips) // COLUMNS)
    sheet = Image.new("RGB", (width * min(COLUMNS, len(strips)), height * lines), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, strip) in enumerate(strips):
        left, upper = width * (index % COLUMNS), height * (index // COLUMNS)
        draw.text(
            (left + 2, upper + 1), name[-48:].encode("ascii", "replace").decode(), fill="black"
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
    times = max(2 * TILE / max(picture.size), 1)
    picture = ImageOps.scale(picture, times, Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (max(picture.width, 2 * TILE), picture.height + 2 * CAPTION), "white")
    sheet.paste(picture)
    font = ImageFont.load_default(CAPTION)
    ImageDraw.Draw(sheet).text((6, picture.height + 5), text, fill="black", font=font)
    return sheet


def _strip(store: Store, part: str, row: int) -> Picture:
    rgb, target = (
        store[f"{part}/{view}"][row] if f"{part}/{view}" in store else None
        for view in ("rgb", "target")
    )
    depth = store.modality == "depth"
    tiles = [] if rgb is None else [rgb]
    if target is not None:
        plane = target if target.ndim == 2 else target[:, :, 0]
        tiles.append(picture_of(target, depth))
        tiles += [] if rgb is None else [_overlay(rgb, plane, depth)]
    return np.concatenate([_enlarge(tile) for tile in tiles], axis=1)


def picture_of(image: NDArray[Any], missing: bool) -> Picture:
    """A stored target image as people see it: (H, W, 3), grey or in its colours.

    Grey are values between their 1st and 99th percentile; no reading (``missing``) is dark blue.
    """
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        return image
    values = (image if image.ndim == 2 else image[:, :, 0]).astype(np.float32)
    valid = values > 0 if missing else np.ones_like(values, bool)
    low, high = np.percentile(values[valid], (1, 99)) if valid.any() else (0.0, 1.0)
    grey = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
    picture = np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    picture[~valid] = (20, 20, 90)
    return picture


def _enlarge(picture: Picture) -> Picture:
    image = Image.fromarray(picture)
    small = picture.shape[0] < TILE
    way = Image.Resampling.NEAREST if small else Image.Resampling.BOX
    return np.asarray(image.resize((TILE, TILE), way))


def _overlay(rgb: Picture, plane: NDArray[np.generic], depth: bool) -> Picture:
    edges = np.hypot(*np.gradient(fill_holes(plane) if depth else plane.astype(np.float32)))
    threshold = np.quantile(edges, 1 - EDGE_SHARE)
    grey = rgb.mean(axis=2) * 0.6 + 80
    picture = np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    picture[edges > max(threshold, 1e-6)] = (230, 0, 0)
    return picture


@dataclass(frozen=True)
class Alignment:
    """What the check found."""

    pairs: int  # number of pairs compared
    own: float  # mean correlation of the pairs as they are
    shifted: float  # mean correlation of the shifted controls
    standard_errors: float  # difference of the two, in standard errors of its mean
    shift: tuple[int, int]  # (right, down) in stored pixels where the mean correlation peaks
    turn: str  # name of a turn that fits clearly better; "" where there is none
    # Ids of pairs that fit each other's partner clearly better than their own.
    swapped: tuple[tuple[str, str], ...]
    unlike: tuple[str, ...]  # ids of pairs whose RGB image half of the other targets fit better

    def summary(self) -> str:
        """One line: whether the pairs look aligned, and the numbers behind it."""
        aligned = not self.turn and self.shift == (0, 0) and self.standard_errors >= CLEAR
        state = "look aligned" if aligned else "do not look aligned"
        if aligned and self.many_unlike:
            state = "look aligned in part"
        return (
            f"pairs {state}: gradient correlation {self.own:.3f} in {self.pairs} pairs, "
            f"shifted controls {self.shifted:.3f} ({self.standard_errors:+.1f} standard errors)"
        )

    @property
    def many_unlike(self) -> bool:
        """Whether more pairs look unlike than registered ones would by chance."""
        return self.pairs >= ENOUGH_PAIRS and len(self.unlike) > MOST_UNLIKE * self.pairs

    def warnings(self) -> list[str]:
        """What the user should look at; empty for registered pairs."""
        if self.turn:
            return [f"target images look {self.turn}: see the contact sheet"]
        messages = [f"pairs {a} and {b} look swapped" for a, b in self.swapped[:8]]
        if self.shift != (0, 0):
            right, down = self.shift
            messages.append(
                f"target images look shifted by {right} pixels to the right and {down} down"
            )
        elif self.standard_errors < CLEAR:
            messages.append(
                "the images of a pair do not look registered: see the contact sheet; "
                "if they are not, crop and align them, or, of data set folders, set "
                "folders.registered=false"
            )
        elif self.many_unlike:
            messages.append(
                f"{len(self.unlike)} of the {self.pairs} pairs that were looked at have hardly an "
                f"edge in common, such as {', '.join(self.unlike[:4])}: look for wrong partners, "
                "dropped frames and turned images"
            )
        return messages


def check_alignment(store: Store, names: Mapping[str, str] | None = None) -> Alignment | None:
    """Compare the TI pairs of a store with shifted, turned and exchanged controls; None: too few.

    ``names`` stand for ids; an id without a name is shown itself.
    """
    count = store.count("ti")
    if count < FEWEST_PAIRS or "ti/rgb" not in store:
        return None
    rows = spread(count, MOST_PAIRS).tolist()
    ids = [(names or {}).get(sample, sample) for sample in store.strings("ti/id")]
    size = store["ti/rgb"].shape[1]
    rgb = np.stack([_edges(store["ti/rgb"][row], False) for row in rows])
    depth = store.modality == "depth"
    target = np.stack([_edges(store["ti/target"][row], depth, channel=0) for row in rows])
    return compare_edges(rgb, target, [ids[row] for row in rows], size / SIDE)


def compare_edges(rgb: Floats, target: Floats, ids: list[str], scale: float) -> Alignment:
    """Compare standardised edge maps (N, SIDE, SIDE) of pairs, each of mean 0 and norm 1.

    ``scale``: stored pixels in a pixel of the maps.
    """
    # (N, SIDE, SIDE): each pair at each cyclic shift (down, right) of the target.
    product = np.conj(np.fft.rfft2(rgb)) * np.fft.rfft2(target)
    everywhere = np.fft.irfft2(product, s=rgb.shape[1:]).astype(np.float32)
    table = rgb.reshape(len(rgb), -1) @ target.reshape(len(rgb), -1).T  # each RGB, each target
    own = np.diag(table)
    step = SIDE // 6
    controls = everywhere[:, [step, -step, 0, 0], [0, 0, step, -step]].mean(axis=1)
    mean = everywhere.mean(axis=0)
    down, right = np.unravel_index(int(mean.argmax()), mean.shape)
    shift = [int(v) if v <= SIDE // 2 else int(v) - SIDE for v in (right, down)]
    # One pixel of the maps or of the store says nothing: light from above does that.
    near = max(map(abs, shift)) <= max(1.0, 1.0 / scale)
    here = near or _standard_errors(everywhere[:, down, right] - controls) < CLEAR_PEAK
    gains = {
        name: _standard_errors((rgb * turn(target)).sum(axis=(1, 2)) - own)
        for name, turn in TURNS.items()
    }
    best_turn = max(gains, key=lambda name: gains[name])
    return Alignment(
        pairs=len(own),
        own=float(own.mean()),
        shifted=float(controls.mean()),
        standard_errors=_standard_errors(own - controls),
        shift=(0, 0) if here else (round(shift[0] * scale), round(shift[1] * scale)),
        turn=best_turn if gains[best_turn] > CLEAR else "",
        swapped=_swapped(table, ids),
        unlike=tuple(ids[pair] for pair in np.flatnonzero(own < np.median(table, axis=1))),
    )


def _standard_errors(gain: Floats) -> float:
    """A mean gain over the pairs, in standard errors of it."""
    return float(gain.mean() / (gain.std(ddof=1) / np.sqrt(len(gain)) + 1e-9))


def _swapped(table: Floats, ids: list[str]) -> tuple[tuple[str, str], ...]:
    """Two pairs whose images fit each other's partner far better than their own.

    ``table`` (N, N) has the correlation of each RGB image with each target image.
    """
    own = np.diag(table)
    typical = max(float(np.median(own)), 0.0)
    scatter = float(np.std(table - np.diag(own))) + 1e-9
    pairs = []
    for first in range(len(table)):
        second = int(table[first].argmax())
        both = min(table[first, second], table[second, first])
        alone = max(own[first], own[second])
        if second > first and both > max(typical / 2, alone + CLEAR * scatter):
            pairs.append((ids[first], ids[second]))
    return tuple(pairs)


def _edges(stored: NDArray[Any], depth: bool, channel: int | None = None) -> Floats:
    """Gradient magnitude (SIDE, SIDE), logarithmic, mean 0 and norm 1.

    ``depth``: whether 0 is a hole; ``channel``: the one that is looked at, None: the mean of all.
    """
    step = max(1, stored.shape[0] // (2 * SIDE))
    plane = np.asarray(stored[::step, ::step], np.float32)
    if plane.ndim == 3:
        plane = plane.mean(axis=2) if channel is None else plane[:, :, channel]
    edges = np.log1p(np.hypot(*np.gradient(fill_holes(plane) if depth else plane)))
    image = Image.fromarray(edges.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX)
    small = np.asarray(image) - np.asarray(image).mean()
    standard: Floats = (small / (np.linalg.norm(small) + 1e-9)).astype(np.float32)
    return standard


def fill_holes(depth: NDArray[Any]) -> Floats:
    """Fill missing depth (0) from the hole's rim inwards, for looking at edges only.

    Holes of structured light lie along the outlines of things, just where edges are looked for.
    """
    filled = depth.astype(np.float32)
    for _ in range(max(filled.shape)):
        hole = filled == 0
        if not hole.any() or hole.all():
            break
        padded = np.pad(filled, 1)
        around = np.stack(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        neighbours = (around > 0).sum(axis=0)
        rim = hole & (neighbours > 0)
        filled[rim] = around.sum(axis=0)[rim] / neighbours[rim]
    return filled
