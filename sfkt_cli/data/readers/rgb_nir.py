"""EPFL RGB-NIR Scene (Brown and Susstrunk, CVPR 2011): 477 registered pairs of 9 scene classes.

    nirscene1/                       or nirscene1.zip, or the folder above
        country/
            0000_rgb.tiff            8 bit, about 1024 x 768
            0000_nir.tiff            one channel, 8 bit
            0002_rgb.tiff            numbers have gaps; png and jpg are read, too
        field/ forest/ indoor/ mountain/ oldbuilding/ street/ urban/ water/

TR and TI classes. SOCKET and the paper recognise six classes and take the other three as TI; which
is not published. Here TI are forest, indoor and water, chosen by content: the only interiors,
closed vegetation and open water, while the others form two families (country, field, mountain and
oldbuilding, street, urban). ``classes.tr`` and ``classes.ti`` change it.
"""

import re
from pathlib import Path

from sfkt_cli.data.archive import open_container
from sfkt_cli.data.records import Archive, Record, archive_of_files, collect, compare_counts
from sfkt_cli.settings.config import Config

PUBLISHED = {
    "country": 52, "field": 51, "forest": 53, "indoor": 56, "mountain": 55, "oldbuilding": 51,
    "street": 50, "urban": 58, "water": 51,
}  # fmt: skip
TI_CLASSES = ("forest", "indoor", "water")
_IMAGE = re.compile(r"([^/]+)/([^/]+)_(rgb|nir)\.(tiff?|png|jpe?g)", re.IGNORECASE)


def read(config: Config, root: Path) -> Archive:
    """List the pairs below ``nirscene1``; raises DataError if a partner is missing."""
    container = open_container(root, tuple(PUBLISHED), ("nirscene1.zip",))
    captures = collect(container, _place, ("rgb", "nir"))
    records = [
        Record(f"{label}-{number}", "", label, views["rgb"], views["nir"])
        for (label, number), views in captures.items()
    ]
    return archive_of_files(
        config, container, records, modality="nir", dtype="uint8",
        usual_tr=tuple(name for name in PUBLISHED if name not in TI_CLASSES),
        usual_ti=TI_CLASSES,
        notes=compare_counts((label for label, _ in captures), PUBLISHED, "rgb-nir: class"),
    )  # fmt: skip


def _place(name: str) -> tuple[tuple[str, str], str] | None:
    match = _IMAGE.fullmatch(name)
    if match is None or match[1].lower() not in PUBLISHED:
        return None
    return (match[1].lower(), match[2]), match[3].lower()
