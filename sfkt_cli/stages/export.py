"""`sfkt export`: models as files that run without this program.

student.onnx, student.pt2                raw target image -> logits, probabilities
student-fp16.onnx, student-int8.onnx     the same in other precisions
bridged-source.*                         translator + untouched RGB model, the same interface
student/, translator/, source/           model.safetensors + model.json
README.md                                model card
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from sfkt_cli import files
from sfkt_cli.console import say, warn
from sfkt_cli.data.sensor import Sensor, prepared_sensor
from sfkt_cli.data.store import open_store
from sfkt_cli.errors import ConfigError, DataError, RunError, SfktError
from sfkt_cli.evaluation import exported
from sfkt_cli.models import graph_files
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.graph_files import FitTarget, SensorGraph
from sfkt_cli.models.saving import CARD, WEIGHTS, Saved, load_model
from sfkt_cli.settings.config import Config, to_yaml
from sfkt_cli.settings.runs import Run, digest_outputs, versions
from sfkt_cli.student import find_student, sensor_of

FORMATS = ("onnx", "pt2", "safetensors")
PRECISIONS = ("fp32", "fp16", "int8")
LEAST_AGREEMENT = 0.95  # share of images that a file gives PyTorch's class; less is warned of
ALWAYS = ("README.md", "config.yaml")  # files that each export has
GRAPHS = tuple(
    name + end
    for name in ("student", "bridged-source")
    for end in (".onnx", "-fp16.onnx", "-int8.onnx", ".pt2")
)
COPIES = tuple(
    f"{name}/{file}" for name in ("student", "translator", "source") for file in (WEIGHTS, CARD)
)
BATCH = 16  # images at a time, where a file takes any number
TIMED = (1, 32)  # batches that are timed, where a file takes any number
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_UNFINISHED = "export"
_INSIDE = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""A file of an export, at most one folder down."""


def export(
    config: Config,
    run: Run,
    *,
    method: str | None = None,
    formats: Sequence[str] = (),
    precisions: Sequence[str] = (),
    output: Path | None = None,
    input_size: str | None = None,
    input_type: str | None = None,
    batch: int | None = None,
    benchmark: bool = False,
) -> None:
    """Write student and bridged source model, each compared with PyTorch on real images.

    The arguments are the options of the command; empty and None mean what is usual there. Does
    nothing if the folder already holds these files, made from the same models in the same way,
    unless ``run.force`` is set. An earlier export stays until all files of this one are made.

    Raises:
        ConfigError: An option is unknown, an extra is not installed, or the output is a file, or a
            folder with other files of these names.
        RunError: There is no student, or a file cannot be made or does not give PyTorch's results.
        DataError: A model or transfer.h5 is missing or damaged.
    """
    _choose("precision", precisions, PRECISIONS)
    formats = check_formats(formats, precisions)
    precisions = precisions or (("fp32", "int8") if benchmark and "onnx" in formats else ("fp32",))
    folders = {"student": find_student(run.folder, method, config.transfer.method)}
    if run.has("bridge") and run.has("source"):
        folders |= {"translator": run.path("bridge"), "source": run.path("source")}
    saved = {name: load_model(folder) for name, folder in folders.items()}
    store = open_store(run.transfer_store)
    sensor = _sensor(run, folders["student"], saved["student"])
    _choose("input-type", [input_type or sensor.dtype], (sensor.dtype, "float32"))
    images = exported.TargetImages(
        store["target/target"],
        store.strings("target/id"),
        parse_size(input_size) if input_size else (sensor.image_size, sensor.image_size),
        sensor.fit,
        input_type or sensor.dtype,
        batch or BATCH,
    )
    target = output or run.path("export")
    if target.is_file():
        raise ConfigError(f"--output {target} is a file: name a folder")
    inputs = {name: model.digest for name, model in saved.items()}
    results = run.path("evaluate", "results.json")  # the model card tells them
    if results.is_file():
        inputs[results.name] = files.sha256_file(results)
    method = folders["student"].name
    made_of = {
        "stage": "export",
        "method": method,
        "formats": sorted(formats),
        "precisions": sorted(precisions),
        "sensor": json.dumps(asdict(sensor)),
        "input_size": input_size,
        "input_type": images.dtype,
        "batch": batch,
        "benchmark": benchmark,
        "inputs": inputs,
        "versions": versions(),
    }
    earlier = _earlier(target)
    same = made_of.items() <= (earlier.model_extra or {}).items()
    if same and all((target / name).is_file() for name in earlier.written) and not run.force:
        say(f"export: already done in {target}")
        return
    if output is not None:
        _refuse_foreign(target)
    measured, compared = images.choose(lowered=set(precisions) != {"fp32"})
    facts = {
        name: _facts(saved[model].card.classes, saved["student"], sensor, images)
        for name, model in (("student", "student"), ("bridged-source", "source"))
        if model in saved
    }
    fit = None
    if input_size:
        fit = FitTarget(*images.size, sensor.image_size, sensor.fit, missing=sensor.missing)
    with _unfinished(target) as folder:
        writer = _Writer(folder, formats, precisions, images, measured, compared, facts, batch)
        writer.labels = exported.labels_told(run, store)
        for name, graph in _graphs(saved, fit).items():
            writer.write(name, graph, benchmark=benchmark)
        for name, model in saved.items() if "safetensors" in formats else ():
            writer.copy(folders[name], name, model, sensor)
        tables = writer.tables()
        for title, text in tables.items():
            say(f"{title}\n\n{text}")
        card = exported.model_card(
            run, method, saved["student"], sensor, images, writer.written, batch, tables
        )
        files.write_text(folder / "README.md", card)
        files.write_settings(folder / "config.yaml", to_yaml(config))
        files.write_record(folder / "done.json", {**made_of, **writer.record()})
        _replace(target, folder, earlier.written, writer.written)
    say(f"export: {len(writer.written)} files are in {target}")


def _earlier(target: Path) -> "Exported":
    """The record of the export that a folder holds; an empty one where there is none."""
    try:
        return files.read_record(target / "done.json", Exported)
    except DataError:
        return Exported(written=[])


def _refuse_foreign(target: Path) -> None:
    """Raise ConfigError if a folder holds files of other origin that an export would replace."""
    readme = target / "README.md"
    begins = readme.read_bytes()[: len(exported.FIRST_LINES)] if readme.is_file() else b""
    if _earlier(target).written or begins == exported.FIRST_LINES.encode():
        return
    foreign = [
        name for name in ("done.json", *ALWAYS, *GRAPHS, *COPIES) if (target / name).exists()
    ]
    if foreign:
        raise ConfigError(
            f"--output {target} holds {', '.join(foreign)}, which `sfkt export` would replace, but "
            "it is no export: choose another folder"
        )


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A folder inside of ``target``, for files that are not all there yet; gone at the end.

    What an interrupted export left is removed.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in (_UNFINISHED, *ALWAYS, *GRAPHS, "done.json"):
        for left in target.glob(f".{name}.*{files.PARTIAL}"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{_UNFINISHED}.", suffix=files.PARTIAL, dir=target
    ) as folder:
        yield Path(folder)


def _replace(target: Path, folder: Path, earlier: Sequence[str], written: Sequence[str]) -> None:
    """Put new files in the place of an earlier export; the record comes last.

    Only what the earlier one wrote is removed, and graphs, which an interrupted one leaves.
    """
    stale = {*filter(_INSIDE.fullmatch, earlier), *GRAPHS} - set(written)
    for name in ("done.json", *stale):
        (target / name).unlink(missing_ok=True)
    for name in (*written, "done.json"):
        (target / name).parent.mkdir(exist_ok=True)
        (folder / name).replace(target / name)
    files.sync_folder(target)


@dataclass
class _Writer:
    """Writes the files of graphs, and compares and times them on real images."""

    folder: Path  # where they go
    formats: Sequence[str]
    precisions: Sequence[str]
    images: exported.TargetImages
    measured: exported.Rows  # images that ranges of activations are measured on
    compared: exported.Rows  # images that files are compared on
    facts: Mapping[str, Mapping[str, str]]  # by the graph into whose files they go
    batch: int | None  # number of images that the files take; None: any
    labels: Mapping[str, int] = field(default_factory=dict)  # class by sample id, where known
    comparisons: list[exported.Comparison] = field(default_factory=list)
    latencies: list[exported.Latency] = field(default_factory=list)
    written: list[str] = field(default_factory=lambda: list(ALWAYS))

    def write(self, name: str, graph: SensorGraph, *, benchmark: bool) -> None:
        """Write all files of a graph."""
        ids = [self.images.ids[row] for row in self.compared.tolist()]
        expected = self.images.ask(graph_files.open_graph(graph), self.compared)
        onnx_files = {}
        for suffix, precision, content in self._contents(name, graph):
            file = name + suffix
            open_file = graph_files.open_pt2 if suffix == ".pt2" else graph_files.open_onnx
            with _making(file):
                probabilities = self.images.ask(open_file(content), self.compared)
            comparison = exported.compare(
                file, precision, content, probabilities, expected, ids, self.labels
            )
            files.write_bytes(self.folder / file, content)
            _tell(comparison)
            self.comparisons.append(comparison)
            self.written.append(file)
            if suffix != ".pt2":
                onnx_files[file] = content
        if benchmark:
            sizes = TIMED if self.batch is None else (self.batch,)
            batches = [self.images.read(np.resize(self.compared, size)) for size in sizes]
            self.latencies += exported.time_all(name, graph, onnx_files, batches)

    def _contents(self, name: str, graph: SensorGraph) -> Iterator[tuple[str, str, bytes]]:
        """End of the name, precision and content of each file of a graph."""
        some = next(self.images.batches(self.measured))
        how: dict[str, Any] = {
            "images": some,
            "facts": self.facts[name],
            "any_batch": self.batch is None,
        }
        if "onnx" in self.formats:
            with _making(f"{name}.onnx"):
                content = graph_files.to_onnx(graph, **how)
            if "fp32" in self.precisions:
                yield ".onnx", "fp32", content
            if "fp16" in self.precisions:
                with _making(f"{name}-fp16.onnx"):
                    half = graph_files.to_onnx(graph_files.halved(graph), **how)
                yield "-fp16.onnx", "fp16", half
            if "int8" in self.precisions:
                batches = partial(self.images.batches, self.measured)
                with _making(f"{name}-int8.onnx"):
                    whole = graph_files.to_int8(content, batches)
                yield "-int8.onnx", "int8", whole
        if "pt2" in self.formats:
            with _making(f"{name}.pt2"):
                program = graph_files.to_pt2(graph, **how)
            yield ".pt2", "fp32", program

    def copy(self, folder: Path, name: str, saved: Saved, sensor: Sensor) -> None:
        """Copy weights, then their card, which also tells how the sensor's images are read."""
        target = self.folder / name
        with files.replacing(target / WEIGHTS) as unfinished:
            shutil.copyfile(folder / WEIGHTS, unfinished)
        more = {"sensor": asdict(sensor)} if saved.card.encoding is not None else {}
        files.write_record(target / CARD, {**saved.card.as_json(), **more})
        say(f"export: {name}/{WEIGHTS}")
        self.written += [f"{name}/{WEIGHTS}", f"{name}/{CARD}"]

    def tables(self) -> dict[str, str]:
        """What was found, as Markdown by title."""
        tables = {}
        if self.comparisons:
            tables["Files"] = exported.comparison_table(self.comparisons)
        if self.latencies:
            table = exported.latency_table(self.latencies)
            tables["Speed"] = f"{exported.machine()}\n\n{table}"
        return tables

    def record(self) -> dict[str, Any]:
        """What was written and found, for done.json."""
        here = [name for name in self.written if "/" not in name]
        return {
            "largest_difference": {one.file: one.largest_difference for one in self.comparisons},
            "files": [asdict(comparison) for comparison in self.comparisons],
            "latencies": [asdict(latency) for latency in self.latencies],
            "written": self.written,
            "outputs": digest_outputs(self.folder, here),
        }


@contextlib.contextmanager
def _making(file: str) -> Iterator[None]:
    """Raise RunError, which names the file, if an exporter or a runtime fails."""
    try:
        yield
    except (SfktError, OSError):
        raise
    except Exception as error:  # they raise errors of many kinds
        raise RunError(f"{file} was not written: {graph_files.reason(error)}") from error


def _tell(comparison: exported.Comparison) -> None:
    """Say how far a file can be trusted."""
    file = comparison.file
    same = round(comparison.agreement * comparison.images)
    say(
        f"export: {file}  the same class as PyTorch on {same} of {comparison.images} images, "
        f"probabilities differ by {comparison.largest_difference:.1e} at most"
    )
    if comparison.agreement < LEAST_AGREEMENT:
        warn(
            f"{file} gives {comparison.images - same} of {comparison.images} images another class "
            "than PyTorch: measure it on labelled images before you ship it, or ship fp32"
        )


class Exported(BaseModel):
    """The content of an export's done.json."""

    model_config = ConfigDict(extra="allow")

    written: list[str]


def check_formats(formats: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """The formats asked for, or all that are possible; raises ConfigError if one is not."""
    _choose("format", formats, FORMATS)
    lacking = [name for name in ONNX_PACKAGES if util.find_spec(name) is None]
    lowered = next((precision for precision in precisions if precision != "fp32"), None)
    if formats and lowered and "onnx" not in formats:
        raise ConfigError(
            f"--precision {lowered} is for ONNX files: add --format onnx to --format {formats[0]}"
        )
    if lacking and ("onnx" in formats or lowered):
        option = f"--precision {lowered}" if lowered else "--format onnx"
        instead = "" if lowered else ", or choose --format pt2"
        raise ConfigError(f"{option} needs {', '.join(lacking)}: pip install 'sfkt[onnx]'{instead}")
    if lacking and not formats:
        say("export: no ONNX files are written; they need pip install 'sfkt[onnx]'")
        return [name for name in FORMATS if name != "onnx"]
    return list(dict.fromkeys(formats or FORMATS))


def _choose(option: str, chosen: Sequence[str], possible: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in possible]
    if unknown:
        raise ConfigError(f"--{option} {unknown[0]}: choose from {', '.join(possible)}")


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of ``480x640``; raises ConfigError if it is no camera's size."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        height = width = 0
    if not (16 <= height <= 8192 and 16 <= width <= 8192):
        raise ConfigError(f"--input-size {text}: write HEIGHTxWIDTH in pixels, such as 480x640")
    return height, width


def _graphs(saved: Mapping[str, Saved], fit: FitTarget | None) -> dict[str, SensorGraph]:
    """Student and bridged source, ready for export."""
    student = saved["student"]
    if not isinstance(student.module, Classifier) or student.card.encoding is None:
        raise DataError("the student's model.json describes no classifier for a target sensor")
    temperature = student.card.temperature
    graphs = {
        "student": SensorGraph(student.module, student.card.encoding, fit, temperature=temperature)
    }
    if "translator" in saved:
        translator = saved["translator"]
        if translator.card.inputs.get("source", saved["source"].digest) != saved["source"].digest:
            warn(
                "bridged-source.*: the bridge was trained for an earlier source model: run "
                "`sfkt bridge --force` to renew it, or do not use these files"
            )
        graphs["bridged-source"] = SensorGraph(
            saved["source"].module,
            translator.encoding_of("bridge"),
            fit,
            translator=translator.module,
        )
    return {name: graph_files.for_export(graph) for name, graph in graphs.items()}


def _sensor(run: Run, folder: Path, student: Saved) -> Sensor:
    """The sensor of a student; raises RunError if the prepared images are of another kind by now.

    Files are compared and calibrated on them.
    """
    sensor = sensor_of(folder, student, student.encoding_of("transfer"))
    prepared = replace(prepared_sensor(run), max_pixels=sensor.max_pixels)
    if not sensor.dtype:  # an earlier version noted neither the type nor, of most data, what it is
        sensor = replace(sensor, dtype=prepared.dtype)
        if sensor.modality == "other" and not prepared.missing:
            sensor = replace(sensor, modality=prepared.modality)
    changed = [
        f"{name} {getattr(sensor, name)!r} (now {value!r})"
        for name, value in asdict(prepared).items()
        if getattr(sensor, name) != value
    ]
    if changed:
        raise RunError(
            f"{folder} was trained on other images than {run.transfer_store} holds now: "
            f"{', '.join(changed)}; train it on these with `sfkt transfer --method {folder.name} "
            "--force`, or prepare them as they were"
        )
    return sensor


def _facts(
    classes: Sequence[str], student: Saved, sensor: Sensor, images: exported.TargetImages
) -> dict[str, str]:
    """What somebody who only has the ONNX file must know."""
    return {
        "classes": json.dumps(classes),
        "input": f"{images.dtype} {list(images.shape)}",
        "unit": sensor.meaning,
        "modality": sensor.modality,
        "sensor": json.dumps(asdict(sensor)),
        "usual": json.dumps(student.card.images or {}),
    }
