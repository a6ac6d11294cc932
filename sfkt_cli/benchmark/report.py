"""The tables of a benchmark: mean, standard deviation, paired differences, and what it cost."""

import csv
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from sfkt_cli import scores
from sfkt_cli.benchmark.plan import GRID, SENSORS, TUNED, BenchmarkPlan, Cell, slug
from sfkt_cli.console import warn
from sfkt_cli.evaluation import figures, report
from sfkt_cli.evaluation.report import BOUNDS, SPLITS, Columns, Row, Section, amount, percent
from sfkt_cli.files import read_record, write_json, write_text
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import versions

METRICS = (
    "n", "accuracy", "balanced_accuracy", "macro_f1", "ece", "train_seconds",
    "images_per_second", "peak_memory_mb", "parameters",
)  # fmt: skip
"""Of a row of results.json, in benchmark-long.csv."""
OWN = ("tgkt+bridge",)
"""Methods that are made from the main one, so that it is not compared with them."""


class Key(NamedTuple):
    """What a row of the tables is about; ``split`` is ``target`` or ``test``."""

    dataset: str
    variant: str
    split: str
    method: str


@dataclass(frozen=True)
class Measured:
    """What one method got right on the labelled images of one split of one cell."""

    row: Row  # its row of results.json
    # By what the archive calls an image, since ids are numbers: other settings, other images.
    right: dict[str, int]  # 1 or 0
    groups: dict[str, str]  # its scene


Trial = Mapping[str, Any]  # an entry of tuning.json
Measurements = Mapping[Key, Mapping[int, Measured]]  # by key and seed


@dataclass(frozen=True)
class Result:
    """One row of the tables: means over the seeds, unless something else is said."""

    dataset: str
    variant: str
    method: str
    split: str
    n: int  # images over all seeds
    seeds: tuple[int, ...]  # those that are there
    accuracies: tuple[float, ...]  # fraction of each seed
    mean: float
    deviation: float | None  # standard deviation over the seeds; None for one seed
    balanced_accuracy: float
    versus: str | None  # the row that it is compared with; None: nothing
    difference: float | None  # difference of accuracy to that, on the same images
    # Its 95 % interval over seeds and scenes; None: one seed.
    difference_ci95: tuple[float, float] | None
    # That there is no difference; holds for all comparisons of its table together.
    p_value: float | None
    train_seconds: float | None
    images_per_second: float | None  # speed of inference
    peak_memory_mb: float | None  # largest
    parameters: int | None  # number of parameters of all networks that a prediction passes
    # Seconds of all trials that chose its settings; None: it was not tuned.
    tuning_seconds: float | None = None
    note: str | None = None  # what a reader must know of this row; becomes a footnote


COLUMNS: Columns[Result] = {
    "variant": lambda result: result.variant,
    "method": lambda result: result.method,
    "accuracy %": lambda result: (
        percent(result.mean)
        + ("" if result.deviation is None else f" ± {percent(result.deviation)}")
    ),
    "balanced %": lambda result: percent(result.balanced_accuracy),
    "difference": lambda result: (
        "-" if result.difference is None else f"{100 * result.difference:+.1f}"
    ),
    "95 % interval": lambda result: report.interval(result.difference_ci95),
    "p": lambda result: "-" if result.p_value is None else f"{result.p_value:.3f}",
    "to": lambda result: result.versus or "-",
    "seeds": lambda result: str(len(result.seeds)),
    "n": lambda result: f"{result.n:,}",
    "training s": lambda result: amount(result.train_seconds),
    "tuning s": lambda result: amount(result.tuning_seconds),
    "images/s": lambda result: amount(result.images_per_second),
    "memory MB": lambda result: amount(result.peak_memory_mb),
    "parameters": lambda result: amount(result.parameters),
}


class Tuning(BaseModel):
    """The content of tuning.json: every trial, and whether it was chosen."""

    trials: list[dict[str, Any]]


def write_report(
    plan: BenchmarkPlan,
    cells: Sequence[Cell],
    output: Path,
    failed: Mapping[str, str],
    command: str,
) -> None:
    """Write benchmark.md, .tex, .csv, .json, benchmark-long.csv and the curves; print the tables.

    ``failed`` are messages by the key of the stage, empty for a stage that was left out because
    another one failed; ``command`` is as typed.
    """
    problems = [message for message in failed.values() if message]
    if left_out := len(failed) - len(problems):
        problems.append(f"left out because of these: {left_out} stage{'s'[: left_out > 1]}")
    shown = [cell for cell in cells if str(cell.folder) not in failed]
    measurements = collect(shown, output)
    unlabelled = without_labels(shown, output)
    path = output / "tuning.json"
    trials = read_record(path, Tuning).trials if path.is_file() else []
    measured = {(key.dataset, key.variant, key.method) for key in measurements}
    tuning = [trial for trial in trials if _tuned_row(trial) in measured]
    results = results_of(plan, cells, measurements, tuning)
    pictures = draw_sweeps(plan, results, output)
    write_json(
        output / "benchmark.json",
        {
            "title": plan.title,
            "command": command,
            "machine": machine(),
            "versions": versions(),
            "plan": plan.model_dump(mode="json"),
            "rows": [asdict(result) for result in results],
            "tuning": tuning,
            "failed": problems,
            "unlabelled": unlabelled,
        },
    )
    tables = tables_of(results)
    text = markdown(plan, results, tables, pictures, problems, unlabelled, command, tuning)
    write_text(output / "benchmark.csv", csv_text(results))
    write_text(output / "benchmark-long.csv", long_csv(measurements))
    write_text(output / "benchmark.tex", report.latex_tables(tables))
    write_text(output / "benchmark.md", text)
    for table in tables:
        report.say_table(table)
    for line in unlabelled:
        warn(line)


def collect(cells: Iterable[Cell], output: Path) -> Measurements:
    """The results of every finished cell."""
    measurements: dict[Key, dict[int, Measured]] = {}
    for cell in cells:
        run = Run(output / cell.folder)
        if not run.finished("evaluate"):
            continue
        with run.output("evaluate", "predictions.csv").open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if line["label"]]
        for row in report.read_results(run).rows:
            if row.method not in cell.rows:
                continue
            here = [line for line in lines if line["split"] == row.split]
            right = {line["name"]: int(line[row.method] == line["label"]) for line in here}
            groups = {line["name"]: line["group"] for line in here}
            key = Key(cell.dataset, cell.variant, row.split, row.method)
            measurements.setdefault(key, {})[cell.seed] = Measured(row, right, groups)
    return measurements


def without_labels(cells: Iterable[Cell], output: Path) -> list[str]:
    """A line for each data set that was evaluated and has no figures, because of its labels."""
    places = {
        cell.dataset: output / cell.folder / "evaluate"
        for cell in cells
        if (run := Run(output / cell.folder)).finished("evaluate")
        and not report.read_results(run).rows
    }
    return [
        f"{name}: no image has a label, so there is no accuracy; {place / 'report.md'} has scores "
        "without labels"
        for name, place in places.items()
    ]


def results_of(
    plan: BenchmarkPlan,
    cells: Sequence[Cell],
    measurements: Measurements,
    tuning: Sequence[Trial] = (),
) -> list[Result]:
    """Rows in the order of the plan: data sets, splits, variants, methods.

    The p-values hold for all comparisons of a table together. The main method and its best peer
    name each other: that is one comparison.
    """
    results = []
    places = dict.fromkeys((cell.dataset, cell.variant, cell.rows) for cell in cells)
    for dataset, split in product(dict.fromkeys(place[0] for place in places), SPLITS):
        keys = [
            Key(dataset, variant, split, method)
            for of, variant, rows in places if of == dataset for method in rows
        ]  # fmt: skip
        versus = {key: reference(plan, measurements, key) for key in keys if key in measurements}
        pairs = [frozenset({key, other}) for key, other in versus.items()]
        table = [result_of(key, measurements, other, tuning) for key, other in versus.items()]
        p_values = {
            pair: row.p_value
            for pair, row in zip(pairs, table, strict=True)
            if row.p_value is not None
        }
        corrected = dict(zip(p_values, scores.holm(list(p_values.values())), strict=True))
        results += [
            replace(row, p_value=corrected.get(pair))
            for pair, row in zip(pairs, table, strict=True)
        ]
    return results


def same_model(first: Mapping[int, Measured], second: Mapping[int, Measured]) -> bool:
    """Whether two rows are of one model, as where a sweep passes the default.

    Two models hardly have the same answers and, by the calibration error, the same probabilities.
    """
    both = first.keys() & second.keys()
    return bool(both) and all(
        first[seed].right == second[seed].right and first[seed].row.ece == second[seed].row.ece
        for seed in both
    )


def reference(plan: BenchmarkPlan, measurements: Measurements, key: Key) -> Key | None:
    """The row to compare with: the first variant for a variant, the main method for a peer.

    The main method of the first variant is compared with the best of its peers. A variant that
    changes nothing of the model is not compared.
    """
    first = plan.variants[0].name
    if key.variant != first:
        other = key._replace(variant=first)
        same = same_model(measurements[key], measurements.get(other, {}))
        return None if same else other
    if key.method in BOUNDS:
        return None
    main = key._replace(method=plan.main)
    if key.method.endswith(TUNED) and main._replace(method=plan.main + TUNED) in measurements:
        main = main._replace(method=plan.main + TUNED)
    if key != main:
        return main
    own = (plan.main, plan.main + TUNED, *OWN, *BOUNDS)
    peers = [other for other in measurements if other[:3] == key[:3] and other.method not in own]

    def mean_accuracy(other: Key) -> float:
        return statistics.fmean(seed.row.accuracy for seed in measurements[other].values())

    return max(peers, key=mean_accuracy, default=None)


def result_of(
    key: Key, measurements: Measurements, versus: Key | None, tuning: Sequence[Trial]
) -> Result:
    """One row of the tables."""
    rows = [measured.row for measured in measurements[key].values()]
    accuracies = tuple(row.accuracy for row in rows)
    against, compared = None, None
    if versus:
        compared = paired(measurements[key], measurements.get(versus, {}))
        against = versus.method if key.variant == versus.variant else versus.variant
    difference, interval_ends, p_value = compared or (None, None, None)
    place = (key.dataset, key.variant, key.method)
    tried = [trial["seconds"] for trial in tuning if _tuned_row(trial) == place]
    return Result(
        **key._asdict(),
        n=sum(row.n for row in rows),
        seeds=tuple(measurements[key]),
        accuracies=accuracies,
        mean=statistics.fmean(accuracies),
        deviation=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        balanced_accuracy=statistics.fmean(row.balanced_accuracy for row in rows),
        versus=against if compared else None,
        difference=difference,
        difference_ci95=interval_ends,
        p_value=p_value,
        train_seconds=_average(row.train_seconds for row in rows),
        images_per_second=_average(row.images_per_second for row in rows),
        peak_memory_mb=max(filter(None, (row.peak_memory_mb for row in rows)), default=None),
        parameters=rows[0].parameters,
        tuning_seconds=sum(tried) if tried else None,
        note=report.joint_note({f"seed {s}": m.row.note for s, m in measurements[key].items()}),
    )


def paired(
    first: Mapping[int, Measured], second: Mapping[int, Measured]
) -> tuple[float, tuple[float, float] | None, float | None] | None:
    """Mean difference over the seeds on the images that both saw, its interval and p-value."""
    differences, groups = [], []
    numbers: dict[str, int] = {}
    for seed in sorted(first.keys() & second.keys()):
        one, other = first[seed], second[seed]
        both = sorted(one.right.keys() & other.right.keys())
        if both:
            differences.append(np.array([one.right[name] - other.right[name] for name in both]))
            scenes = [numbers.setdefault(one.groups[name], len(numbers)) for name in both]
            groups.append(np.array(scenes))
    return scores.difference_over_seeds(differences, groups) if differences else None


def draw_sweeps(
    plan: BenchmarkPlan, results: Sequence[Result], output: Path
) -> list[tuple[str, str]]:
    """A picture for each swept setting and data set; names and captions."""
    lines: dict[tuple[str, str, str], dict[str, list[tuple[float, float, float]]]] = {}
    for sweep in plan.sweeps:
        values = {sweep.variant(value).name: value for value in sweep.values}
        for row in (row for row in results if row.variant in values):
            label = sweep.name if len(sweep.methods) == 1 else f"{row.method}, {sweep.name}"
            picture = lines.setdefault((row.dataset, sweep.setting, row.split), {})
            point = (values[row.variant], row.mean, row.deviation or 0.0)
            picture.setdefault(label, []).append(point)
    several = len(plan.datasets) > 1 or any(data.sensor_pairs for data in plan.datasets)
    drawn = []
    for (dataset, setting, split), curves in lines.items():
        file = f"sweep-{setting}-{split}{f'-{slug(dataset)}' if several else ''}.png"
        figures.draw_sweep(output / file, curves, setting, f"accuracy %, {split}")
        drawn.append((file, f"{setting} on {dataset}, {split} split: mean and standard deviation"))
    return drawn


def markdown(
    plan: BenchmarkPlan,
    results: Sequence[Result],
    tables: Sequence[Section],
    pictures: Sequence[tuple[str, str]],
    failed: Sequence[str],
    unlabelled: Sequence[str],
    command: str,
    tuning: Sequence[Trial],
) -> str:
    """The report for people."""
    facts = (
        f"Command: {command}",
        f"Seeds: {', '.join(map(str, plan.seeds))}; machine: {machine()}; versions: "
        + ", ".join(f"{name} {number}" for name, number in versions().items()),
        "± standard deviation over the seeds. Difference: points of accuracy on the same images, "
        "mean over the seeds, with its 95 % t interval: the scatter of training and of images, "
        "those of a scene together. One seed has none. p: of no difference, corrected for all "
        "comparisons of the table (Holm)",
        "Training: seconds beyond the source model, for a method that uses the bridge with the "
        "bridge; images/s: inference. Bounds saw labels or RGB images of the target task",
    )
    parts = [f"# {report.plain(plan.title)}", report.bullets(facts)]
    of_seeds: dict[tuple[str, str, str], dict[str, None]] = {}  # methods in their order, once
    for result in results:
        if set(result.seeds) != set(plan.seeds):
            place = result.dataset, result.variant, ", ".join(map(str, result.seeds))
            of_seeds.setdefault(place, {})[result.method] = None
    fewer = [
        f"{dataset}, {variant}: {seeds} alone, for {', '.join(methods)}"
        for (dataset, variant, seeds), methods in of_seeds.items()
    ]
    lists = {"Not all seeds": fewer, "Not finished": failed, "No labels": unlabelled}
    for title, places in lists.items():
        if places:
            parts += [f"## {title}", report.bullets(places)]
    parts += sensor_tables(plan, results)
    for table in tables:
        parts += report.markdown_section(table)
    if tuning:
        text = "Tried on the first seed, the same for all methods; no label was looked at."
        header = ("data", "variant", "method", *GRID, "score", "value", "training s", "chosen")
        lines = [
            (t["dataset"], t["variant"], t["method"], *map(str, t["settings"].values()),
             t["score"], amount(t["value"]), amount(t["seconds"]), "yes" if t["chosen"] else "")
            for t in tuning
        ]  # fmt: skip
        parts += report.markdown_section(Section("Tuning", (text,), header, lines, left=3))
    for file, caption in pictures:
        parts += [f"![{report.plain(caption)}]({file})", report.plain(caption)]
    return "\n\n".join(parts) + "\n"


def sensor_tables(plan: BenchmarkPlan, results: Sequence[Result]) -> list[str]:
    """SUN RGB-D: mean accuracy of each method, source sensor down, target sensor across."""
    first, parts = plan.variants[0].name, []
    for dataset in (dataset for dataset in plan.datasets if dataset.sensor_pairs):
        for split, method in dict.fromkeys((r.split, r.method) for r in results):
            mean = {
                r.dataset: percent(r.mean) for r in results
                if (r.split, r.method, r.variant) == (split, method, first)
            }  # fmt: skip
            cells = [
                (row, *(mean.get(f"{dataset.name} {row} to {column}", "-") for column in SENSORS))
                for row in SENSORS
            ]
            title = f"{dataset.name}: {method}, {split} split, accuracy %"
            table = Section(title, (), ("RGB, then depth", *SENSORS), cells)
            heading, *lines = report.markdown_section(table)
            parts += [f"#{heading}", *lines]
    return ["## Sensor pairs", *parts] if parts else []


def tables_of(results: Sequence[Result]) -> list[Section]:
    """A table for each data set and split; the variant comes first where there are several."""
    tables = []
    for (dataset, split), group in groupby(results, lambda row: (row.dataset, row.split)):
        rows = list(group)
        several = len({row.variant for row in rows}) > 1
        columns = {name: text for name, text in COLUMNS.items() if several or name != "variant"}
        title = f"{dataset}: {SPLITS[split]}"
        tables.append(report.table_of(title, columns, rows, left=1 + several))
    return tables


def csv_text(results: Sequence[Result]) -> str:
    """The rows as CSV: a number or a name a cell; what is not known is empty."""
    lines = []
    for result in results:
        values = asdict(result)
        low, high = values.pop("difference_ci95") or (None, None)
        del values["accuracies"]
        values |= {"seeds": len(result.seeds), "difference_low": low, "difference_high": high}
        lines.append(["" if value is None else value for value in values.values()])
    header = list(values) if lines else Key._fields
    return report.to_csv(header, lines)


def long_csv(measurements: Measurements) -> str:
    """One number a line: data set, variant, method, seed, split, metric, value."""
    lines = [
        [key.dataset, key.variant, key.method, seed, key.split, metric, value]
        for key, of_seeds in measurements.items()
        for seed, measured in of_seeds.items()
        for metric in METRICS
        if (value := getattr(measured.row, metric)) is not None
    ]
    header = ["dataset", "variant", "method", "seed", "split", "metric", "value"]
    return report.to_csv(header, lines)


def _tuned_row(trial: Trial) -> tuple[str, ...]:
    return trial["dataset"], trial["variant"], trial["method"] + TUNED


def machine() -> str:
    """What ran it, in a few words."""
    import torch

    gpus = torch.cuda.device_count()
    name = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "no GPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {name}"


def _average(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None
