"""One module an archive format; READERS is the table of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sfkt_cli.data.archive import forget_indexes
from sfkt_cli.data.download import SOURCES
from sfkt_cli.data.readers import (
    diml_rgbd,
    folders,
    nyu_depth,
    rgb_nir,
    sun_rgbd,
    synthetic,
    washington_rgbd,
)
from sfkt_cli.data.records import Archive, settle_ids
from sfkt_cli.errors import DataError
from sfkt_cli.settings.config import Config

READERS: dict[str, Callable[[Config, Path], Archive]] = {
    "synthetic": synthetic.read,
    "rgb-nir": rgb_nir.read,
    "nyu-depth": nyu_depth.read,
    "sun-rgbd": sun_rgbd.read,
    "diml-rgbd": diml_rgbd.read,
    "washington-rgbd": washington_rgbd.read,
    "folders": folders.read,
}
DATA_FOLDER = Path("data")  # archives lie in ``data/<data set>`` unless prepare.root says where


def archive_root(config: Config) -> Path:
    """Where the archive of a configuration lies."""
    return config.prepare.root or DATA_FOLDER / config.dataset


def read_archive(config: Config) -> Archive:
    """List the samples of the configured archive; no image is decoded.

    Raises a DataError if the archive is missing, incomplete, or not what it should be.
    """
    forget_indexes()
    root = archive_root(config)
    if config.dataset in SOURCES and not root.exists():
        raise DataError(f"{root} does not exist: give the archive with --root, or use --download")
    archive = READERS[config.dataset](config, root)
    if not archive.records:
        raise DataError(f"{root} holds no samples of {config.dataset}")
    return replace(archive, records=settle_ids(archive.records, root))
