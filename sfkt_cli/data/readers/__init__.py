"""One module an archive format; READERS is the table of them."""

from collections.abc import Callable
from pathlib import Path

from sfkt_cli.config import Config
from sfkt_cli.data.container import forget_indexes
from sfkt_cli.data.readers import rgb_nir, synthetic
from sfkt_cli.data.records import Archive
from sfkt_cli.errors import DataError

READERS: dict[str, Callable[[Config, Path], Archive]] = {
    "synthetic": synthetic.read,
    "rgb-nir": rgb_nir.read,
}
DATA_FOLDER = Path("data")
"""Archives are looked for in ``data/<data set>`` unless ``prepare.root`` says where."""


def archive_root(config: Config) -> Path:
    """Where the archive of a configuration lies."""
    return config.prepare.root or DATA_FOLDER / config.dataset


def read_archive(config: Config) -> Archive:
    """List the samples of the configured archive; no image is decoded.

    Raises:
        DataError: The archive is missing, incomplete, or not what it should be.
    """
    forget_indexes()
    archive = READERS[config.dataset](config, archive_root(config))
    if not archive.records:
        raise DataError(f"{archive_root(config)} holds no samples of {config.dataset}")
    return archive
