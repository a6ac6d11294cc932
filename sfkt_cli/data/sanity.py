"""What a few target images tell about the settings, before all of them are read.

Each check gives a warning, or "" where nothing looks wrong.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.decode import FINER, as_image_values, is_coloured
from sfkt_cli.data.grid import fit_target
from sfkt_cli.data.records import FileLoader
from sfkt_cli.settings.config import Config, FoldersConfig

SAMPLES = 8  # number of images that are looked at
NOTABLE_SHARE = 0.001  # of pixels that hold the largest value there is
LOST_SHARE = 0.01  # of readings that are too far away
COARSEST = 8  # millimetres of a step that depth may be rounded to
LEVELS = 64  # fewer grey levels show little
LEAST_CONTRAST = 0.5  # share of an image's contrast that a value without a meaning may leave
FLIR = b"FLIR\0"  # begins the segments of a JPEG file that hold temperatures
Images = Mapping[str, NDArray[Any]]  # by what messages call them


def check_targets(loader: FileLoader, names: Sequence[str], config: Config) -> tuple[str, ...]:
    """Warnings about target images that seem to mean something else than the settings say.

    Raises:
        DataError: One of the images that are looked at is damaged or of another type.
    """
    files = {loader.container.describe(name): name for name in names[:: -(-len(names) // SAMPLES)]}
    decoded = {place: loader.decode(name) for place, name in files.items()}
    stored = {place: loader.sensor.convert(values, place) for place, values in decoded.items()}
    own = config.folders
    problems = [_rounded(decoded, stored, own)]
    if loader.sensor.missing:
        problems += [_largest(decoded, own), _too_far(decoded, stored, own)]
    else:
        problems += [_opaque(stored) or _lone(decoded, stored, loader, config)]
    if own.modality == "thermal":
        problems += [_coloured(decoded, loader, files)]
    return tuple(problem for problem in problems if problem)


def _largest(decoded: Images, own: FoldersConfig) -> str:
    """Depth: pixels that hold the largest value there is, which is often no reading."""
    largest = {np.iinfo(v.dtype).max for v in decoded.values() if v.dtype.kind == "u"}
    top = max(largest, default=np.nan)
    share = float(np.mean([(values == top).mean() for values in decoded.values()]))
    if share < NOTABLE_SHARE:
        return ""
    return (
        f"{100 * share:.1f} % of the pixels of {len(decoded)} depth images are {top}, the largest "
        f"value there is: if it stands for no reading, set folders.missing={[*own.missing, top]}"
    )


def _too_far(decoded: Images, stored: Images, own: FoldersConfig) -> str:
    """Depth: readings that 16 bits of millimetres cannot hold."""
    readings = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in decoded.values()])
    kept = np.concatenate([values[stored[place] > 0] for place, values in decoded.items()])
    share = float((readings > kept.max()).mean()) if kept.size else 0.0
    if share < LOST_SHARE:
        return ""
    scale = own.scale or (1 if own.unit == "mm" else 1000)  # whole numbers are never too far
    step = math.ceil(float(np.percentile(readings, 99)) / 65535 * scale)
    top = float(readings.max())
    advice = (
        f"folders.scale={scale / step:.9g} keeps them, in steps of {step} mm"
        f"{', with folders.unit=auto' if own.unit != 'auto' else ''}"
        if step <= COARSEST
        else f"if {top:.9g} stands for no reading, as of the sky, set "
        f"folders.missing={[*own.missing, top]}"
    )
    return (
        f"{100 * share:.1f} % of the readings of {len(decoded)} depth images lie beyond 65.535 m "
        f"and count as no reading: {advice}"
    )


def _rounded(decoded: Images, stored: Images, own: FoldersConfig) -> str:
    """Fractions that make up the image, and are rounded away."""
    if own.unit not in ("raw", "mm"):
        return ""
    levels = {
        place: len(np.unique(stored[place]))
        for place, values in decoded.items()
        if np.any(values[np.isfinite(values)] % 1)
    }
    place = max(levels, key=lambda place: levels[place], default="")
    if not place or levels[place] >= LEVELS:
        return ""
    advice = FINER if own.unit == "raw" else "are they metres, folders.unit=m?"
    return (
        f"{place} has fractions, which folders.unit={own.unit} rounds: {levels[place]} different "
        f"values are left; {advice}"
    )


def _opaque(stored: Images) -> str:
    """A last channel that says nothing, and far from the others takes most of the contrast."""
    images = list(stored.values())
    top = np.iinfo(images[0].dtype).max
    if not all(v.ndim == 3 and v.shape[2] in (2, 4) and (v[..., -1] == top).all() for v in images):
        return ""
    return (
        f"the last of {images[0].shape[2]} channels of {len(images)} target images is {top} "
        "everywhere, as an opaque alpha channel is: it takes contrast from the others; save the "
        "images without it"
    )


def _lone(decoded: Images, stored: Images, loader: FileLoader, config: Config) -> str:
    """A border or dead pixels: 0 or the largest value, so far from all others that these fade."""
    own, problems = config.folders, []
    in_window = config.encoding == "linear" or (config.encoding, own.modality) == ("auto", "nir")
    for place, values in decoded.items():
        if values.dtype == np.uint8 and in_window:  # 0 to 255, whatever the images hold
            continue
        largest = np.iinfo(values.dtype).max if values.dtype.kind == "u" else None
        for lone in (0, largest or (65535 if own.unit == "raw" else 1)):
            others = values[values != lone]
            if not 0 < others.size < values.size:
                continue
            low, high = np.percentile(others, (2, 98))
            if min(abs(low - lone), abs(high - lone)) <= high - low:
                continue
            mended = loader.sensor.convert(
                as_image_values(values, place, [lone], missing=False), place
            )
            before, after = (
                fit_target(image, config.image_size, loader.sensor.fit, missing=False).std()
                for image in (stored[place], mended)
            )
            if after < LEAST_CONTRAST * before:
                problems.append(
                    f"{place} is {lone} in {1 - others.size / values.size:.2%} of its pixels, far "
                    f"from the others ({low:.6g} to {high:.6g}), and leaves them "
                    f"{100 * after / before:.2g} % of their contrast: if it stands for no reading, "
                    f"set folders.missing={[*own.missing, lone]}"
                )
    if not problems:
        return ""
    return f"{problems[0]} ({len(problems)} of {len(decoded)} images that were looked at)"


def _coloured(decoded: Images, loader: FileLoader, files: Mapping[str, str]) -> str:
    """Thermal: pictures in false colours."""
    place = next((place for place, values in decoded.items() if is_coloured(values)), "")
    if not place:
        return ""
    flir = FLIR in loader.container.read(files[place])
    return (
        f"{place} is coloured: switch the camera's false colours off, or save the temperatures "
        f"{'that this FLIR file holds ' if flir else ''}as 16-bit TIFF"
    )
