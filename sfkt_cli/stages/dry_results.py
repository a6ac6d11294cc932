"""`--dry-run` of what comes after training: ``export`` and ``predict``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfkt_cli.config import Config
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import DataError
from sfkt_cli.models.saving import WEIGHTS
from sfkt_cli.runs import Run
from sfkt_cli.stages.export import check_formats, load_parts, samples
from sfkt_cli.stages.outlook import Outlook, tell
from sfkt_cli.stages.predict import BATCH, check_output, expand, read_batches
from sfkt_cli.student import find_student, load_student
from sfkt_cli.training.runtime import make_runtime

ROW_BYTES = 60
"""Of a prediction, about, beside the path."""


def try_export(
    config: Config,
    run: Run,
    *,
    method: str | None,
    formats: Sequence[str],
    output: Path | None,
    input_size: str | None,
) -> dict[str, Any]:
    """Read the models and name the files that would be written; arguments as those of export.

    Raises:
        SfktError: What the stage itself would refuse.
    """
    chosen = check_formats(formats)
    folders, saved = load_parts(config, run, method)
    samples(open_store(run.transfer_store), config, input_size)
    sizes = {name: (folder / WEIGHTS).stat().st_size for name, folder in folders.items()}
    graphs = {"student": sizes["student"]}
    if "translator" in sizes:
        graphs["bridged-source"] = sizes["translator"] + sizes["source"]
    writes: dict[str, int] = {}
    for kind in chosen:
        for name, size in (sizes if kind == "safetensors" else graphs).items():
            writes[f"{name}/{WEIGHTS}" if kind == "safetensors" else f"{name}.{kind}"] = size
    does = (
        f"writes the student of {folders['student'].name} for {', '.join(saved['student'].classes)}"
        ", and compares each graph with PyTorch"
    )
    reads = {str(folders[name] / WEIGHTS): size for name, size in sizes.items()}
    writes["README.md (model card)"] = 0
    return tell(Outlook("export", does, None, reads, writes, output or run.path("export"), {}))


def try_predict(
    config: Config,
    run: Run,
    images: Sequence[str],
    *,
    output: Path,
    method: str | None,
    model: Path | None,
) -> dict[str, Any]:
    """Classify the first images, for their time; arguments as those of predict.

    Raises:
        SfktError: What the stage itself would refuse.
    """
    check_output(output)
    folder = find_student(model or run.folder, method, config.transfer.method)
    student = load_student(folder, device=make_runtime(config.runtime).device)
    paths, broken = list(expand(images)), list[str]()
    began = time.monotonic()
    for batch in read_batches(student, paths[:BATCH], broken):
        student.predict_stored([image for _, image in batch])
    seconds = (time.monotonic() - began) / min(len(paths), BATCH) * len(paths)
    if len(broken) == len(paths):
        raise DataError(f"{broken[0]}; none of {len(paths)} images can be read")
    does = f"classifies {len(paths):,} images as {', '.join(student.classes)}"
    size = sum(ROW_BYTES + len(str(path)) for path in paths)
    return tell(
        Outlook(
            "predict", does, seconds, {str(folder / WEIGHTS): (folder / WEIGHTS).stat().st_size},
            {output.name: size}, output.parent, {}, notes=tuple(broken[:8]),
        )
    )  # fmt: skip
