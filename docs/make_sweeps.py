"""Put the curves of a benchmark on one page.

    python docs/make_sweeps.py docs/sweeps.png runs/ablation/sweep-*-target.png

The curves are drawn by `sfkt benchmark`, here of sample_configs/ablation.yaml.
"""

from __future__ import annotations

import sys

from PIL import Image

COLUMNS = 2

picture, *files = sys.argv[1:]
curves = [Image.open(file).convert("RGB") for file in files]
width, height = (max(curve.size[axis] for curve in curves) for axis in (0, 1))
page = Image.new("RGB", (COLUMNS * width, -(-len(curves) // COLUMNS) * height), "white")
for number, curve in enumerate(curves):
    page.paste(curve, (number % COLUMNS * width, number // COLUMNS * height))
page.save(picture, optimize=True)
