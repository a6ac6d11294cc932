"""The rendered data set of simple solids: no files, so the archive is a number (the seed).

Labels go round the classes, TI pairs last; each image is a scene (group) of its own.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfkt_cli.data.demo.synthetic import CLASSES, TI_CLASSES, TR_CLASSES, render
from sfkt_cli.data.records import Archive, Record
from sfkt_cli.settings.config import Config


@dataclass(frozen=True)
class SyntheticLoader:
    """Renders images one by one; the two views of a pair come from the same rendering."""

    seed: int

    def rgb(self, record: Record, size: int) -> NDArray[np.uint8]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return _rendered(self.seed, record.id, size)[0]

    def target(self, record: Record, size: int) -> NDArray[Any]:
        """See :class:`~sfkt_cli.data.records.Loader`."""
        return _rendered(self.seed, record.id, size)[1]


@functools.lru_cache(maxsize=1)
def _rendered(seed: int, name: str, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    label, _, index = name.rpartition("-")
    rgb, depth_mm = render(np.array([CLASSES.index(label)]), seed=seed, first=int(index), size=size)
    return rgb[0], depth_mm[0]


def read(config: Config, root: Path) -> Archive:
    """List the images; ``root`` is not used."""
    del root
    pairs = config.synthetic.pairs
    tr_pairs = round(pairs * (1 - config.synthetic.ti_share))
    records = []
    for index in range(pairs):
        own = TR_CLASSES if index < tr_pairs else TI_CLASSES
        label = own[index % len(own)]
        name = f"{label}-{index:06d}"
        path = f"synthetic/{config.seed}/{index:06d}"
        records.append(Record(name, name, label, f"{path}/rgb", f"{path}/depth"))
    about = f"{config.seed} {pairs} {tr_pairs} {TR_CLASSES} {TI_CLASSES}"
    return Archive(
        records=tuple(sorted(records, key=lambda record: record.id)),
        loader=SyntheticLoader(config.seed),
        digest=hashlib.sha256(about.encode()).hexdigest(),
        modality="depth",
        unit="mm",
        dtype="uint16",
        usual_tr=TR_CLASSES,
        usual_ti=TI_CLASSES,
    )
