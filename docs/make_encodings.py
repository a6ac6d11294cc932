"""Draw docs/encodings.png: one depth image and one grey image in every encoding.

    python docs/make_encodings.py docs/encodings.png

The grey image is the brightness of rendered RGB, in the place of a near-infrared or thermal one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from sfkt_cli.data.images import as_rgb, choose_encoding, encode
from sfkt_cli.data.readers.synthetic import CLASSES, render
from sfkt_cli.evaluation.figures import Strip, draw_gallery


def main(picture: Path) -> None:
    """Render six solids at 96 pixels and encode them."""
    pairs = [render(CLASSES[3 * index], index, seed=4, size=96) for index in range(6)]
    rgb, depth = map(np.stack, zip(*pairs, strict=True))
    grey = rgb.astype(np.float32).mean(axis=3).astype(np.uint8)
    strips = [Strip("RGB", rgb / 255.0)]
    for modality, stored in (("depth", depth), ("nir", grey)):
        kinds = ("window", "relative", "colormap", "shading", "normals", "hha")
        for kind in kinds if modality == "depth" else ("linear", "standardised"):
            encoding = choose_encoding(kind, modality, stored)
            shown = as_rgb(encode(torch.from_numpy(stored.astype(np.float32)), encoding))
            strips.append(Strip(f"{modality}: {kind}", shown.permute(0, 2, 3, 1).numpy()))
    draw_gallery(picture, strips)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
