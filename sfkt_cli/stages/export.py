"""`sfkt export`: models as files that run without this program.

student.onnx, student.pt2                raw target image -> logits, probabilities
bridged-source.onnx, bridged-source.pt2  translator + untouched RGB model, the same interface
student/, translator/, source/           model.safetensors + model.json
README.md                                model card
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from sfkt_cli.console import say
from sfkt_cli.data.sensor import Sensor, sensor_of_store
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.errors import ConfigError, DataError, RunError
from sfkt_cli.evaluation.model_card import model_card
from sfkt_cli.files import replacing, sha256_file, write_text
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.graphs import BridgedSourceGraph, FitTarget, StudentGraph, for_export
from sfkt_cli.models.onnx_files import open_session, quietly, write_onnx
from sfkt_cli.models.saving import CARD, WEIGHTS, Saved, load_model
from sfkt_cli.settings.config import Config, to_yaml
from sfkt_cli.settings.runs import Run, versions
from sfkt_cli.settings.sealed import read_record, write_record, write_settings
from sfkt_cli.student import find_student

FORMATS = ("onnx", "pt2", "safetensors")
LARGEST_DIFFERENCE = 1e-3
"""Between the probabilities of a written file and of PyTorch; more is refused."""
SAMPLES = 64
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ["logits", "probabilities"]
_INSIDE = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""A file of an export, at most one folder down."""


def export(
    config: Config,
    run: Run,
    *,
    method: str | None = None,
    formats: Sequence[str] = (),
    output: Path | None = None,
    input_size: str | None = None,
) -> None:
    """Write student and bridged source model, each checked against PyTorch on real samples.

    Does nothing where the folder holds them already, made of the same models in the same way, but
    for ``run.force``.

    Args:
        config: ``transfer.method`` is taken where a run has several students.
        run: A run with a finished transfer.
        method: Which student; None: the only one, or that of ``transfer.method``.
        formats: onnx, pt2, safetensors; empty: all that this installation can write.
        output: Folder; None: ``export`` in the run.
        input_size: ``HEIGHTxWIDTH`` of the sensor's images; None: they come as prepared.

    Raises:
        ConfigError: A format or the size is unknown, an extra is not installed, or the output is a
            file.
        RunError: There is no student, or a written file does not give PyTorch's results.
        DataError: A model or transfer.h5 is missing or damaged.
    """
    formats = check_formats(formats)
    folders, saved = load_parts(config, run, method)
    store = open_store(run.transfer_store)
    sensor, images, fit = samples(store, config, input_size)
    ids = [store.strings("target/id")[row] for row in sample_rows(store)]
    method = folders["student"].name
    target = output or run.path("export")
    if target.is_file():
        raise ConfigError(f"--output {target} is a file: name a folder")
    made_of = {
        "stage": "export",
        "method": method,
        "formats": sorted(formats),
        "input_size": input_size,
        "inputs": {name: each.digest for name, each in saved.items()} | _told_by_card(run),
        "versions": versions(),
    }
    if _is_done(target, made_of) and not run.force:
        say(f"export: already done in {target}")
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in _written(target):
        (target / name).unlink(missing_ok=True)
    differences: dict[str, float] = {}
    for name, graph in _graphs(saved, fit).items():
        facts = _facts(saved["student"], sensor, images)
        for kind in formats:
            if kind == "safetensors":
                continue
            path = target / f"{name}.{kind}"
            content, probabilities = WRITERS[kind](graph, images, facts)
            differences[path.name] = _compare(path.name, graph, images, probabilities, ids)
            with replacing(path) as partial:
                partial.write_bytes(content)
            say(
                f"export: {path}  the same class as PyTorch on {len(images)} images, "
                f"probabilities differ by {differences[path.name]:.1e} at most"
            )
    if "safetensors" in formats:
        for name, each in saved.items():
            _copy(folders[name], target / name, each, sensor)
            say(f"export: {target / name / WEIGHTS}")
    card = model_card(run, method, saved["student"], sensor, images)
    write_text(target / "README.md", card)
    write_settings(target / "config.yaml", to_yaml(config))
    written = ["README.md", "config.yaml", *differences]
    if "safetensors" in formats:
        written += [f"{name}/{file}" for name in saved for file in (WEIGHTS, CARD)]
    record = {**made_of, "largest_difference": differences, "written": written}
    write_record(target / "done.json", record)


def _told_by_card(run: Run) -> dict[str, str]:
    """Digest of the results that the model card tells, where there are some."""
    path = run.path("evaluate", "results.json")
    return {"results.json": sha256_file(path)} if path.is_file() else {}


class Exported(BaseModel):
    """The content of an export's done.json."""

    model_config = ConfigDict(extra="allow")

    written: list[str]


def _is_done(folder: Path, made_of: Mapping[str, object]) -> bool:
    """Whether a folder holds what would be written."""
    with contextlib.suppress(DataError):
        record = read_record(folder / "done.json", Exported)
        same = made_of.items() <= (record.model_extra or {}).items()
        return same and all((folder / name).is_file() for name in record.written)
    return False


def _written(folder: Path) -> list[str]:
    """Files of an earlier export, done.json the first; of a folder nothing else is touched."""
    with contextlib.suppress(DataError):
        written = read_record(folder / "done.json", Exported).written
        return ["done.json", *(name for name in written if _INSIDE.fullmatch(name))]
    return ["done.json"]


def load_parts(
    config: Config, run: Run, method: str | None
) -> tuple[dict[str, Path], dict[str, Saved]]:
    """Student, and where they are finished translator and source: their folders and what they hold.

    Raises:
        RunError: There is no student.
        DataError: A model is damaged.
    """
    folders = {"student": find_student(run.folder, method, config.transfer.method)}
    if run.finished("bridge") and run.finished("source"):
        folders |= {"translator": run.path("bridge"), "source": run.path("source")}
    return folders, {name: load_model(folder) for name, folder in folders.items()}


def check_formats(formats: Sequence[str]) -> list[str]:
    """The formats that were asked for, or all that this installation can write.

    Raises:
        ConfigError: One is unknown or needs an extra that is not installed.
    """
    lacking = [name for name in ONNX_PACKAGES if util.find_spec(name) is None]
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ConfigError(f"--format {unknown[0]}: choose of {', '.join(FORMATS)}")
    if lacking and "onnx" in formats:
        raise ConfigError(
            f"--format onnx needs {', '.join(lacking)}: pip install 'sfkt[onnx]', "
            "or choose --format pt2"
        )
    if lacking and not formats:
        say("export: no ONNX files, for that pip install 'sfkt[onnx]'")
        return [name for name in FORMATS if name != "onnx"]
    return list(dict.fromkeys(formats or FORMATS))


def samples(
    store: Store, config: Config, size: str | None
) -> tuple[Sensor, Tensor, FitTarget | None]:
    """The sensor, some real images of it, and what crops and resizes them if they are to be large.

    Raises:
        ConfigError: The size is none.
    """
    sensor = sensor_of_store(store, config)
    stored = torch.from_numpy(np.array(store["target/target"][sample_rows(store)]))
    if size is None:
        return sensor, stored, None
    try:
        height, width = (int(part) for part in size.lower().split("x"))
    except ValueError:
        height = width = 0
    if not (16 <= height <= 8192 and 16 <= width <= 8192):
        raise ConfigError(f"--input-size {size}: write HEIGHTxWIDTH in pixels, such as 480x640")
    down = torch.arange(height) * sensor.image_size // height
    across = torch.arange(width) * sensor.image_size // width
    large = torch.from_numpy(np.ascontiguousarray(stored.numpy()[:, down][:, :, across]))
    fit = FitTarget(height, width, sensor.image_size, sensor.fit, missing=sensor.missing)
    return sensor, large, fit


def sample_rows(store: Store) -> NDArray[np.int64]:
    """Rows of the target images that written files are tried on."""
    rows = np.linspace(0, store.count("target") - 1, SAMPLES).astype(int)
    return np.unique(rows)


def _graphs(saved: Mapping[str, Saved], fit: FitTarget | None) -> dict[str, nn.Module]:
    student = saved["student"]
    graphs: dict[str, nn.Module] = {}
    if isinstance(student.module, Classifier) and student.encoding is not None:
        graphs["student"] = StudentGraph(student.module, student.encoding, fit)
    if "translator" in saved:
        translator, source = saved["translator"], saved["source"]
        if isinstance(source.module, Classifier) and translator.encoding is not None:
            graphs["bridged-source"] = BridgedSourceGraph(
                translator.module, source.module, translator.encoding, fit
            )
    if "student" not in graphs:
        raise DataError("the student's model.json describes no classifier for a target sensor")
    return {name: for_export(graph) for name, graph in graphs.items()}


def _facts(student: Saved, sensor: Sensor, images: Tensor) -> dict[str, str]:
    """What somebody who only has the ONNX file must know."""
    return {
        "classes": json.dumps(student.classes),
        "input": f"{str(images.dtype).removeprefix('torch.')} {list(images.shape[1:])}",
        "unit": sensor.meaning,
        "modality": sensor.modality,
    }


def _to_onnx(graph: nn.Module, images: Tensor, facts: Mapping[str, str]) -> tuple[bytes, Tensor]:
    """The ONNX file, and its probabilities for the images."""
    content = write_onnx(graph, images[:2], OUTPUTS, facts)
    (found,) = open_session(content).run(["probabilities"], {"images": images.numpy()})
    return content, torch.from_numpy(found)


def _to_pt2(graph: nn.Module, images: Tensor, facts: Mapping[str, str]) -> tuple[bytes, Tensor]:
    """The same for an exported program of PyTorch."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    file = io.BytesIO()
    with quietly():
        program = torch.export.export(graph, (images[:2],), dynamic_shapes=shapes)
        torch.export.save(program, file, extra_files=dict(facts))
        file.seek(0)
        again = torch.export.load(file).module()
    return file.getvalue(), again(images)[1]


Writer = Callable[[nn.Module, Tensor, Mapping[str, str]], tuple[bytes, Tensor]]
WRITERS: dict[str, Writer] = {"onnx": _to_onnx, "pt2": _to_pt2}


def _compare(
    name: str, graph: nn.Module, images: Tensor, found: Tensor, ids: Sequence[str]
) -> float:
    """The largest difference of a file's probabilities to PyTorch's.

    Raises:
        RunError: It is too large, or an image gets another class; the images are named.
    """
    with torch.no_grad():
        _, expected = graph(images)
    gaps = (found - expected).abs().amax(1)
    # Two classes that are equally probable but for rounding may change places.
    wrong = ~(gaps <= LARGEST_DIFFERENCE)
    if wrong.any():
        others = int((found.argmax(1) != expected.argmax(1)).sum())
        named = ", ".join(each for each, bad in zip(ids, wrong.tolist(), strict=True) if bad)
        raise RunError(
            f"{name} was not written: {int(wrong.sum())} of {len(images)} images get other "
            f"probabilities than in PyTorch, by {float(gaps.max()):.2g} (more than "
            f"{LARGEST_DIFFERENCE:g}), and {others} another class: {named[:300]}"
        )
    return float(gaps.max())


def _copy(folder: Path, target: Path, saved: Saved, sensor: Sensor) -> None:
    """Weights, then the card, which tells in addition how the sensor's images are read."""
    with replacing(target / WEIGHTS) as partial:
        shutil.copyfile(folder / WEIGHTS, partial)
    more = {"sensor": sensor.as_dict()} if saved.encoding is not None else {}
    write_record(target / CARD, {**saved.card, **more})
