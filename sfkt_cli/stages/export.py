"""`sfkt export`: models as files that run without this program.

student.onnx, student.pt2                raw target image -> logits, probabilities
student-fp16.onnx, student-int8.onnx     the same in other precisions
bridged-source.*                         translator + untouched RGB model, the same interface
student/, translator/, source/           model.safetensors + model.json
README.md                                model card
"""

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sfkt_cli import files
from sfkt_cli.console import say, warn
from sfkt_cli.data.sensor import Sensor, prepared_sensor
from sfkt_cli.data.store import Store, open_store
from sfkt_cli.errors import (
    ConfigError,
    DataError,
    RunError,
    SfktError,
    how_to_install,
    installed,
    need,
)
from sfkt_cli.evaluation import exported, report
from sfkt_cli.methods import ENCODED
from sfkt_cli.models import graph_files
from sfkt_cli.models.graph_files import FitTarget, SensorGraph
from sfkt_cli.models.saving import CARD, WEIGHTS, Saved, load_model, read_card, write_model
from sfkt_cli.settings.config import Config, to_yaml
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import digest_outputs, record_of, versions, why_not_done
from sfkt_cli.student import load_saved, sensor_of

ENDS = {
    ".onnx": ("onnx", "fp32"),
    "-fp16.onnx": ("onnx", "fp16"),
    "-int8.onnx": ("onnx", "int8"),
    ".pt2": ("pt2", "fp32"),
}
"""Format and precision of the file of a graph, by how its name ends."""
OPENERS = {"onnx": graph_files.open_onnx, "pt2": graph_files.open_pt2}
FORMATS = (*OPENERS, "safetensors")
PRECISIONS = tuple(precision for kind, precision in ENDS.values() if kind == "onnx")
LEAST_AGREEMENT = 0.95  # share of images that a file gives PyTorch's class; less is warned of
ALWAYS = ("README.md", "config.yaml")  # files that each export has
GRAPHS = tuple(name + end for name in ("student", "bridged-source") for end in ENDS)
COPIES = tuple(
    f"{name}/{file}" for name in ("student", "translator", "source") for file in (WEIGHTS, CARD)
)
BRIDGED = {"translator": "bridge", "source": "source"}  # models behind each other, and their stages
TIMED = (1, 32)  # batches that are timed, where a file takes any number
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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

    The arguments are the options of the command; empty and None stand for their defaults. Does
    nothing if the folder already holds these files, made from the same models in the same way,
    unless ``run.force`` is set. An earlier export stays until all files of this one are made.

    Raises:
        ConfigError: An option is unknown, an extra is not installed, or the output is a file, or a
            folder with other files of these names.
        RunError: There is no student, a file cannot be made or does not give PyTorch's results, or
            another process exports to the same folder.
        DataError: A model or transfer.h5 is missing or damaged.
    """
    target = output or run.path("export")
    if target.is_file():
        raise ConfigError(f"--output {target} is a file: name a folder")
    request = _request(
        config, run, method, formats=formats, precisions=precisions, input_size=input_size,
        input_type=input_type, batch=batch, benchmark=benchmark,
    )  # fmt: skip
    earlier = _record_of(target)
    if request.made_of.items() <= earlier.items() and not why_not_done(target) and not run.force:
        say(f"export: already done in {target}")
        return
    if output is not None:
        _refuse_foreign(target, earlier)
    target.mkdir(parents=True, exist_ok=True)
    busy = f"another sfkt process exports to {target}: wait for it to end"
    with files.locking(target, busy), _unfinished(target) as folder:
        written = _write_all(folder, request, config, run)
        _replace(target, folder, written)
    say(f"export: {len(written)} files are in {target}")


@dataclass(frozen=True)
class _Request:
    """What is exported, and how."""

    saved: Mapping[str, Saved]  # the student, and a bridge's translator and source model
    store: Store
    sensor: Sensor
    images: exported.TargetImages  # as the files take them
    fit: FitTarget | None  # what the files do to the sensor's images before they encode them
    formats: Sequence[str]
    precisions: Sequence[str]
    benchmark: bool  # whether the files are timed
    made_of: Mapping[str, Any]  # all of this, for done.json


def _request(
    config: Config,
    run: Run,
    method: str | None,
    *,
    formats: Sequence[str],
    precisions: Sequence[str],
    input_size: str | None,
    input_type: str | None,
    batch: int | None,
    benchmark: bool,
) -> _Request:
    """Check the options of the command and open what they ask for; errors as of :func:`export`."""
    _choose("precision", precisions, PRECISIONS)
    formats = check_formats(formats, precisions)
    precisions = precisions or (("fp32", "int8") if benchmark and "onnx" in formats else ("fp32",))
    folder, student = load_saved(run.folder, method, config.transfer.method)
    saved = {"student": student}
    if run.has("bridge") and run.has("source"):
        saved |= {name: load_model(run.path(stage)) for name, stage in BRIDGED.items()}
    store = open_store(run.transfer_store)
    sensor = _sensor(run, folder, student)
    _choose("input-type", [input_type or sensor.dtype], (sensor.dtype, "float32"))
    images = exported.TargetImages(
        store["target/target"],
        store.strings("target/id"),
        parse_size(input_size) if input_size else (sensor.image_size, sensor.image_size),
        sensor.fit,
        input_type or sensor.dtype,
        batch,
    )
    fit = None
    if input_size:
        fit = FitTarget(*images.size, sensor.image_size, sensor.fit, missing=sensor.missing)
    inputs = {name: model.digest for name, model in saved.items()}
    if method == ENCODED:  # whose encoding is that of a student
        inputs[folder.name] = read_card(folder / CARD).sha256
    results = run.path("evaluate", "results.json")  # the model card tells them
    if results.is_file():
        inputs[results.name] = files.sha256_file(results)
    made_of = {
        "stage": "export",
        "method": method or folder.name,
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
    return _Request(saved, store, sensor, images, fit, formats, precisions, benchmark, made_of)


def _write_all(folder: Path, request: _Request, config: Config, run: Run) -> list[str]:
    """Write all files of an export into a folder; returns the names that done.json vouches for."""
    saved, sensor, images = request.saved, request.sensor, request.images
    writer = _Writer(folder, request, exported.labels_told(run, request.store))
    facts = _facts(saved["student"], sensor, images)
    for name, classes, graph in [*_graphs(saved, request.fit)]:  # both, before one is written
        writer.write(name, graph, {"classes": json.dumps(classes), **facts})
    for name, model in saved.items() if "safetensors" in request.formats else ():
        _copy(folder / name, model, sensor)
    tables = exported.tables(writer.comparisons.values(), writer.latencies)
    for table in tables:
        report.say_table(table)
    card = exported.model_card(
        run, request.made_of["method"], saved["student"], sensor, images,
        list(writer.comparisons), tables,
    )  # fmt: skip
    files.write_text(folder / "README.md", card)
    files.write_settings(folder / "config.yaml", to_yaml(config))
    made = sorted(path for path in folder.rglob("*") if path.is_file())
    written = [path.relative_to(folder).as_posix() for path in made]
    record = {
        **request.made_of,
        "largest_difference": {k: v.largest_difference for k, v in writer.comparisons.items()},
        "files": [asdict(comparison) for comparison in writer.comparisons.values()],
        "latencies": [asdict(latency) for latency in writer.latencies],
        "outputs": digest_outputs(folder, written),
    }
    files.write_record(folder / "done.json", record)
    return written


def _record_of(target: Path) -> dict[str, Any]:
    """The done.json of the export in a folder; empty if there is none."""
    try:
        return record_of(target)
    except DataError:
        return {}


def _refuse_foreign(target: Path, earlier: Mapping[str, Any]) -> None:
    """Raise ConfigError if an export would replace files that are not from an export."""
    readme = target / "README.md"
    begins = readme.read_bytes()[: len(exported.FIRST_LINES)] if readme.is_file() else b""
    if earlier.get("stage") == "export" or begins == exported.FIRST_LINES.encode():
        return
    foreign = [
        name for name in ("done.json", *ALWAYS, *GRAPHS, *COPIES) if (target / name).exists()
    ]
    if foreign:
        raise ConfigError(
            f"--output {target} holds {', '.join(foreign)}, which `sfkt export` would replace, but "
            "it is not an export: choose another folder"
        )


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A folder inside of ``target`` for unfinished files; it is removed at the end."""
    prefix = ".export."
    for left in target.glob(f"{prefix}*{files.PARTIAL}"):  # by an export that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(files.PARTIAL, prefix, target) as folder:
        yield Path(folder)


def _replace(target: Path, folder: Path, written: Sequence[str]) -> None:
    """Replace an earlier export, or a part of one, by new files; the record comes last."""
    for name in ("done.json", *({*GRAPHS, *COPIES} - {*written})):
        (target / name).unlink(missing_ok=True)
    for name in (*written, "done.json"):
        (target / name).parent.mkdir(exist_ok=True)
        (folder / name).replace(target / name)
    files.sync_folder(target)


def _copy(target: Path, saved: Saved, sensor: Sensor) -> None:
    """Write weights, then their card, which also says how the sensor's images are read."""
    target.mkdir()
    more = {"sensor": sensor} if saved.card.encoding is not None else {}
    write_model(target, saved.module, saved.card.model_copy(update=more))
    say(f"export: {target.name}/{WEIGHTS}")


@dataclass
class _Writer:
    """Writes the files of graphs, and compares and times them on real images."""

    folder: Path  # where they go
    request: _Request
    labels: Mapping[str, int]  # class by sample id, where known
    comparisons: dict[str, exported.Comparison] = field(default_factory=dict)  # by file
    latencies: list[exported.Latency] = field(default_factory=list)

    def write(self, name: str, graph: SensorGraph, facts: Mapping[str, str]) -> None:
        """Write all files of a graph; the facts go into each."""
        images, onnx_files = self.request.images, {}
        measured, compared = images.choose(lowered=set(self.request.precisions) != {"fp32"})
        ids = [images.ids[row] for row in compared.tolist()]
        expected = images.ask(graph_files.open_graph(graph), compared)
        for end, make in self._makers(graph, facts, measured).items():
            file, (kind, precision) = name + end, ENDS[end]
            try:
                content = make()
                probabilities = images.ask(OPENERS[kind](content), compared)
            except (SfktError, OSError):
                raise
            except Exception as error:  # exporters and runtimes raise errors of many kinds
                why = graph_files.reason(error)
                raise RunError(f"{file} was not written: {why}") from error
            comparison = exported.compare(
                file, precision, content, probabilities, expected, ids, self.labels
            )
            files.write_bytes(self.folder / file, content)
            _tell_comparison(comparison)
            self.comparisons[file] = comparison
            if kind == "onnx":
                onnx_files[file] = content
        if self.request.benchmark:
            sizes = TIMED if images.batch is None else (images.batch,)
            batches = [images.read(np.resize(compared, size)) for size in sizes]
            self.latencies += exported.time_all(name, graph, onnx_files, batches)

    def _makers(
        self, graph: SensorGraph, facts: Mapping[str, str], measured: exported.Rows
    ) -> dict[str, Callable[[], bytes]]:
        """What makes each file of a graph that is asked for, by how the file's name ends."""
        request, images = self.request, self.request.images
        batches = partial(images.batches, measured)
        how: dict[str, Any] = {
            "images": next(batches()), "facts": facts, "any_batch": images.batch is None,
        }  # fmt: skip
        fp32 = functools.cache(partial(graph_files.to_onnx, graph, **how))
        makers: dict[str, Callable[[], bytes]] = {
            ".onnx": fp32,
            "-fp16.onnx": lambda: graph_files.to_onnx(graph_files.halved(graph), **how),
            "-int8.onnx": lambda: graph_files.to_int8(fp32(), batches),
            ".pt2": partial(graph_files.to_pt2, graph, **how),
        }
        return {
            end: makers[end]
            for end, (kind, precision) in ENDS.items()
            if kind in request.formats and (kind != "onnx" or precision in request.precisions)
        }


def _tell_comparison(comparison: exported.Comparison) -> None:
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


def check_formats(formats: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """The requested formats, or all possible ones; raises ConfigError if one is not possible."""
    _choose("format", formats, FORMATS)
    lowered = next((precision for precision in precisions if precision != "fp32"), None)
    if formats and lowered and "onnx" not in formats:
        raise ConfigError(
            f"--precision {lowered} is for ONNX files: add --format onnx to --format {formats[0]}"
        )
    if lowered:
        need(f"--precision {lowered}", "onnx", *ONNX_PACKAGES)
    elif "onnx" in formats:
        need("--format onnx", "onnx", *ONNX_PACKAGES, instead=", or choose --format pt2")
    elif not formats and not all(map(installed, ONNX_PACKAGES)):
        say(f"export: no ONNX files are written; for these, {how_to_install('onnx')}")
        return [name for name in FORMATS if name != "onnx"]
    return list(dict.fromkeys(formats or FORMATS))


def _choose(option: str, chosen: Sequence[str], possible: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in possible]
    if unknown:
        raise ConfigError(f"--{option} {unknown[0]}: choose from {', '.join(possible)}")


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of ``480x640``; raises ConfigError if it is not the size of an image."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        height = width = 0
    if not (16 <= height <= 8192 and 16 <= width <= 8192):
        raise ConfigError(f"--input-size {text}: write HEIGHTxWIDTH in pixels, such as 480x640")
    return height, width


def _graphs(
    saved: Mapping[str, Saved], fit: FitTarget | None
) -> Iterator[tuple[str, Sequence[str], SensorGraph]]:
    """Name, classes and graph of the student and of the bridged source, ready for export."""
    student = saved["student"]
    encoding, temperature = student.encoding_of("transfer"), student.card.temperature
    graph = SensorGraph(student.classifier, encoding, fit, temperature=temperature)
    yield "student", student.card.classes, graph_files.for_export(graph)
    if "translator" in saved:
        translator, source = saved["translator"], saved["source"]
        if translator.card.inputs.get("source", source.digest) != source.digest:
            warn(
                "bridged-source.*: the bridge was trained for an earlier source model: run "
                "`sfkt bridge --force` to renew it, or do not use these files"
            )
        encoding = translator.encoding_of("bridge")
        graph = SensorGraph(source.module, encoding, fit, translator=translator.module)
        yield "bridged-source", source.card.classes, graph_files.for_export(graph)


def _sensor(run: Run, folder: Path, student: Saved) -> Sensor:
    """The sensor of a student; raises RunError if the prepared images are now of another kind.

    Files are compared and calibrated on these images.
    """
    sensor = sensor_of(folder, student)
    prepared = prepared_sensor(run)
    if changed := sensor.changes(prepared):
        raise RunError(
            f"{folder} was trained on other images than {run.transfer_store} holds now: "
            f"{changed}; train it on these with `sfkt transfer --method {folder.name} "
            "--force`, or prepare them as they were"
        )
    return sensor


def _facts(student: Saved, sensor: Sensor, images: exported.TargetImages) -> dict[str, str]:
    """What a user who only has the ONNX file must know, beside the classes."""
    return {
        "input": f"{images.dtype} {list(images.shape)}",
        "unit": sensor.meaning,
        "modality": sensor.modality,
        "sensor": json.dumps(asdict(sensor)),
        "usual": json.dumps(student.card.images or {}),
    }
