"""The tables of a benchmark: mean, standard deviation, paired differences, and what it cost."""

import csv
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sfkt_cli import scores
from sfkt_cli.benchmark.plan import SENSORS, TUNED, BenchmarkPlan, Cell, Trial, slug
from sfkt_cli.console import warn
from sfkt_cli.evaluation import figures, report
from sfkt_cli.evaluation.report import BOUNDS, SPLITS, Line, Row, Section, amount, percent
from sfkt_cli.files import read_record, write_json, write_text
from sfkt_cli.settings.runs import Run
from sfkt_cli.settings.stage import Done

METRICS = (
    "n", "accuracy", "balanced_accuracy", "macro_f1", "ece", "train_seconds",
    "images_per_second", "peak_memory_mb", "parameters",
)  # fmt: skip
"""Of a row of results.json, in benchmark-long.csv."""
COMPARISON = ("balanced %", "difference", "95 % interval", "p", "to", "n")
COSTS = ("training s", "tuning s", "images/s", "memory MB", "parameters")
"""Columns of the tables; a page has room for those of one kind."""
COMPARED = (
    "± standard deviation over the seeds. Difference: points of accuracy on the same images, mean "
    "over the seeds, with its 95 % t interval: the scatter of training and of images, those of a "
    "group together. One seed has none. p: of no difference, corrected for all comparisons of the "
    "table (Holm). To: the row compared with. n: images over all seeds"
)
COSTING = (
    "Training: seconds beyond the source model, for a method that uses the bridge with the bridge; "
    "images/s: inference; memory: the largest"
)
"""What the columns of either kind mean."""


class Key(NamedTuple):
    """What identifies a row of the tables; ``split`` is ``target`` or ``test``."""

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


Measurements = Mapping[Key, Mapping[int, Measured]]  # by key and seed


@dataclass(frozen=True)
class Result:
    """One row of the tables: means over the seeds, unless a comment says otherwise."""

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


def write_report(
    plan: BenchmarkPlan,
    cells: Sequence[Cell],
    evaluated: Sequence[Cell],
    trials: Sequence[Trial],
    output: Path,
    failed: Mapping[str, str],
    command: str,
) -> None:
    """Write benchmark.md, .tex, .csv, .json, benchmark-long.csv and the curves; print the tables.

    ``evaluated`` are the cells that have results for the settings of the plan. ``failed`` has
    messages by the key of the stage, empty for a stage that was left out because another one
    failed. ``command`` is as typed.
    """
    problems = [message for message in failed.values() if message]
    if left_out := len(failed) - len(problems):
        problems.append(f"left out because of these: {left_out} stage{'s'[: left_out > 1]}")
    measurements, without_labels = collect(evaluated, output)
    unlabelled = [
        f"{name}: no image has a label, so there is no accuracy; {path} has scores without labels"
        for name, path in without_labels.items()
    ]
    labelled = [cell for cell in cells if cell.dataset not in without_labels]
    missing, makers = missing_rows(plan, labelled, measurements), makers_of(evaluated, output)
    measured = {(key.dataset, key.variant, key.method) for key in measurements}
    tuning = [trial for trial in trials if _tuned_row(trial) in measured]
    results = results_of(plan, cells, measurements, tuning)
    write_json(
        output / "benchmark.json",
        {
            "title": plan.title,
            "command": command,
            "made_by": [{"by": maker, "stages": count} for maker, count in makers],
            "plan": plan.model_dump(mode="json"),
            "rows": [asdict(result) for result in results],
            "tuning": tuning,
            "missing": missing,
            "failed": problems,
            "unlabelled": unlabelled,
        },
    )
    facts = (
        f"Command: {command}",
        f"Seeds: {', '.join(map(str, plan.seeds))}",
        *(f"Made on {maker}; stages: {count}" for maker, count in makers),
        COMPARED,
        f"{COSTING}. Bounds saw labels or RGB images of the target task",
    )
    lists = {"Missing": missing, "Not finished": problems, "No labels": unlabelled}
    tables = tables_of(results)
    parts = [
        f"# {report.plain(plan.title)}",
        report.bullets(facts),
        *(f"## {title}\n\n{report.bullets(lines)}" for title, lines in lists.items() if lines),
    ]
    by_sensor = sensor_tables(plan, results)
    for section in [*by_sensor, *tables, *tuning_tables(tuning)]:
        parts += report.markdown_section(section)
    methods = dict.fromkeys(row.method.removesuffix(TUNED) for row in results)
    parts.append(report.bullets(f"{name}: {report.MEANINGS[name]}" for name in methods))
    for file, caption in draw_sweeps(plan, results, measurements, output):
        parts += [f"![{report.plain(caption)}]({file})", report.plain(caption)]
    write_text(output / "benchmark.csv", csv_text(results))
    write_text(output / "benchmark-long.csv", long_csv(measurements))
    latex = report.latex_tables([*by_sensor, *narrow(tables, missing)])
    write_text(output / "benchmark.tex", latex)
    write_text(output / "benchmark.md", "\n\n".join(filter(None, parts)) + "\n")
    for table in tables:
        report.say_table(table)
    for line in unlabelled:
        warn(line)


def collect(cells: Iterable[Cell], output: Path) -> tuple[Measurements, dict[str, Path]]:
    """The results of evaluated cells, and a report for each data set that has no labels."""
    measurements: dict[Key, dict[int, Measured]] = {}
    unlabelled: dict[str, Path] = {}
    for cell in cells:
        run = Run(output / cell.folder)
        rows = report.read_results(run).rows
        if not rows:
            unlabelled[cell.dataset] = run.path("evaluate", "report.md")
        with run.output("evaluate", "predictions.csv").open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if line["label"]]
        for row in rows:
            if row.method not in cell.rows:
                continue
            here = [line for line in lines if line["split"] == row.split]
            right = {line["name"]: int(line[row.method] == line["label"]) for line in here}
            groups = {line["name"]: line["group"] for line in here}
            key = Key(cell.dataset, cell.variant, row.split, row.method)
            measurements.setdefault(key, {})[cell.seed] = Measured(row, right, groups)
    return measurements, unlabelled


def results_of(
    plan: BenchmarkPlan,
    cells: Sequence[Cell],
    measurements: Measurements,
    tuning: Sequence[Trial] = (),
) -> list[Result]:
    """Rows in the order of the plan: data sets, splits, variants, methods.

    The p-values hold for all comparisons of a table together. The main method and its best peer
    name each other: that is one comparison, and so are two of the same two models.
    """
    results = []
    places = dict.fromkeys((cell.dataset, cell.variant, cell.rows) for cell in cells)
    for dataset, split in product(dict.fromkeys(place[0] for place in places), SPLITS):
        keys = [
            Key(dataset, variant, split, method)
            for of, variant, rows in places if of == dataset for method in rows
        ]  # fmt: skip
        versus = {key: reference(plan, measurements, key) for key in keys if key in measurements}
        pair = {
            key: frozenset({model_of(measurements, key), other and model_of(measurements, other)})
            for key, other in versus.items()
        }
        table = {key: result_of(key, measurements, other, tuning) for key, other in versus.items()}
        p_values = {pair[key]: row.p_value for key, row in table.items() if row.p_value is not None}
        corrected = dict(zip(p_values, scores.holm([*p_values.values()]), strict=True))
        results += [replace(row, p_value=corrected.get(pair[key])) for key, row in table.items()]
    return results


def same_model(first: Mapping[int, Measured], second: Mapping[int, Measured]) -> bool:
    """Whether two rows are of one model, such as when a sweep passes the default.

    Two models hardly have both the same answers and the same calibration error.
    """
    both = first.keys() & second.keys()
    return bool(both) and all(
        first[seed].right == second[seed].right and first[seed].row.ece == second[seed].row.ece
        for seed in both
    )


def model_of(measurements: Measurements, key: Key) -> Key:
    """The row that a row is a copy of: the untuned one, where tuning kept the default."""
    untuned = key._replace(method=key.method.removesuffix(TUNED))
    own, other = measurements.get(key, {}), measurements.get(untuned, {})
    return untuned if own.keys() == other.keys() and same_model(own, other) else key


def reference(plan: BenchmarkPlan, measurements: Measurements, key: Key) -> Key | None:
    """The row to compare with: that of the first variant, else the main method of its own.

    The main method of the first variant is compared with the best of its peers, among those that
    have most of its seeds. A variant that changes nothing of the model is not compared.
    """
    other = key._replace(variant=plan.variants[0].name)
    if key != other and other in measurements:
        return None if same_model(measurements[key], measurements[other]) else other
    if key.method in BOUNDS:
        return None
    mains = sorted((plan.main, plan.main + TUNED), reverse=key.method.endswith(TUNED))
    there = (row for method in mains if (row := key._replace(method=method)) in measurements)
    if (main := next(there, None)) != key:
        return main
    own = (plan.main, plan.main + TUNED, "tgkt+bridge", *BOUNDS)
    peers = [other for other in measurements if other[:3] == key[:3] and other.method not in own]

    def common_seeds_and_hits(peer: Key) -> tuple[int, float]:
        common = measurements[peer].keys() & measurements[key].keys()
        return len(common), sum(measurements[peer][seed].row.accuracy for seed in common)

    return max(peers, key=common_seeds_and_hits, default=None)


def result_of(
    key: Key, measurements: Measurements, versus: Key | None, tuning: Sequence[Trial]
) -> Result:
    """One row of the tables."""
    rows = [measured.row for measured in measurements[key].values()]
    accuracies = tuple(row.accuracy for row in rows)
    notes = [note_of(measurements[key])]
    against, compared = None, None
    if versus:
        compared = paired(measurements[key], measurements[versus])
        against = versus.method if key.variant == versus.variant else versus.variant
        common = [str(seed) for seed in measurements[key] if seed in measurements[versus]]
        if compared and len(common) < len(rows):
            notes.append(f"difference over the seeds of both rows: {', '.join(common)}")
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
        note="; ".join(filter(None, notes)) or None,
    )


def note_of(of_seeds: Mapping[int, Measured]) -> str | None:
    """What a reader must know of the models of one row."""
    return report.joint_note({f"seed {seed}": it.row.note for seed, it in of_seeds.items()})


def paired(
    first: Mapping[int, Measured], second: Mapping[int, Measured]
) -> tuple[float, tuple[float, float] | None, float | None] | None:
    """Mean difference over the seeds on the images of both rows, its interval and p-value."""
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
    plan: BenchmarkPlan, results: Sequence[Result], measurements: Measurements, output: Path
) -> list[tuple[str, str]]:
    """A picture for each swept setting and data set; names and captions."""
    lines: dict[tuple[str, str, str], dict[str, list[tuple[float, float, float]]]] = {}
    notes: dict[tuple[str, str, str], dict[str, str | None]] = {}
    for sweep in plan.sweeps:
        values = {sweep.variant(value).name: value for value in sweep.values}
        for row in (row for row in results if row.variant in values):
            label = sweep.name if len(sweep.methods) == 1 else f"{row.method}, {sweep.name}"
            place = (row.dataset, sweep.setting, row.split)
            point = (values[row.variant], row.mean, row.deviation or 0.0)
            lines.setdefault(place, {}).setdefault(label, []).append(point)
            measured = measurements[Key(row.dataset, row.variant, row.split, row.method)]
            notes.setdefault(place, {})[f"{row.method} with {row.variant}"] = note_of(measured)
    several = len(plan.datasets) > 1 or any(data.sensor_pairs for data in plan.datasets)
    drawn = []
    for place, curves in lines.items():
        dataset, setting, split = place
        file = f"sweep-{setting}-{split}{f'-{slug(dataset)}' if several else ''}.png"
        figures.draw_sweep(output / file, curves, setting, f"accuracy %, {split}")
        spread = " and standard deviation" if len(plan.seeds) > 1 else ", one seed"
        caption = f"{setting} on {dataset}, {split} split: mean{spread}"
        note = report.joint_note(notes[place])
        drawn.append((file, f"{caption}; {note}" if note else caption))
    return drawn


def makers_of(cells: Iterable[Cell], output: Path) -> Sequence[tuple[str, int]]:
    """The machines and versions that made these cells, most stages first, with their number."""
    records = {
        path.resolve()
        for cell in cells
        for stage in ("*", "transfer/*")
        for path in (output / cell.folder).glob(f"{stage}/done.json")
    }
    made = (read_record(path, Done) for path in sorted(records))
    return Counter(
        f"{done.machine}: {', '.join(f'{name} {number}' for name, number in done.versions.items())}"
        for done in made
    ).most_common()


def missing_rows(
    plan: BenchmarkPlan, cells: Iterable[Cell], measurements: Measurements
) -> list[str]:
    """A line for all rows of a data set and variant that lack the same seeds."""
    there = {
        (key.dataset, key.variant, key.method, seed)
        for key, of_seeds in measurements.items()
        for seed in of_seeds
    }
    rows = dict.fromkeys((cell.dataset, cell.variant, row) for cell in cells for row in cell.rows)
    evaluated = {(dataset, variant, seed) for dataset, variant, _, seed in there}
    lines: dict[str, list[str]] = {}
    for dataset, variant, row in rows:
        seeds = [
            str(seed)
            for seed in plan.seeds
            if (dataset, variant, row, seed) not in there
            # Some data have no RGB images to test with.
            and not (row == "source-rgb" and (dataset, variant, seed) in evaluated)
        ]
        if seeds:
            place = f"{dataset}, {variant}, seed{'s'[: len(seeds) > 1]} {', '.join(seeds)}"
            lines.setdefault(place, []).append(row)
    return [f"{place}: {', '.join(methods)}" for place, methods in lines.items()]


def tuning_tables(tuning: Sequence[Trial]) -> list[Section]:
    """Tables of the trials for tuned rows; none without tuned rows."""
    text = (
        f"Settings of the rows that end in {TUNED}: tried on the first seed, the same for all "
        "methods; no label was looked at."
    )
    lines = [
        {
            "data": trial["dataset"],
            "variant": trial["variant"],
            "method": trial["method"],
            **{name: str(value) for name, value in trial["settings"].items()},
            "score": trial["score"],
            "value": amount(trial["value"]),
            "training s": amount(trial["seconds"]),
            "chosen": "yes" if trial["chosen"] else "",
        }
        for trial in tuning
    ]
    return [Section("Tuning", (text,), lines, left=3)] if lines else []


def sensor_tables(plan: BenchmarkPlan, results: Sequence[Result]) -> list[Section]:
    """SUN RGB-D: mean accuracy of each method, source sensor down, target sensor across."""
    variants, tables = {variant.name for variant in plan.variants}, []
    for dataset in (dataset for dataset in plan.datasets if dataset.sensor_pairs):
        pairs = {f"{dataset.name} {source} to {to}" for source in SENSORS for to in SENSORS}
        means: dict[tuple[str, ...], dict[str, str]] = {}
        for row in results:
            if row.dataset in pairs and row.variant in variants:
                named = (*([row.variant] if len(variants) > 1 else []), row.method, row.split)
                means.setdefault(named, {})[row.dataset] = percent(row.mean)
        for named, mean in means.items():
            lines = [
                {"RGB, then depth": source}
                | {to: mean.get(f"{dataset.name} {source} to {to}", "-") for to in SENSORS}
                for source in SENSORS
            ]
            title = f"Sensor pairs of {dataset.name}: {', '.join(named)} split, accuracy %"
            tables.append(Section(title, lines=lines))
    return tables


def tables_of(results: Sequence[Result]) -> list[Section]:
    """A table for each data set and split; with several variants, their column comes first."""
    several = len({row.variant for row in results}) > 1

    def line(result: Result) -> Line:
        deviation = "" if result.deviation is None else f" ± {percent(result.deviation)}"
        difference, p_value = result.difference, result.p_value
        return {
            **({"variant": result.variant} if several else {}),
            "method": result.method,
            "accuracy %": percent(result.mean) + deviation,
            "balanced %": percent(result.balanced_accuracy),
            "difference": "-" if difference is None else f"{100 * difference:+.1f}",
            "95 % interval": report.interval(result.difference_ci95),
            "p": "-" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
            "to": result.versus or "-",
            "seeds": str(len(result.seeds)),
            "n": f"{result.n:,}",
            "training s": amount(result.train_seconds),
            "tuning s": amount(result.tuning_seconds),
            "images/s": amount(result.images_per_second),
            "memory MB": amount(result.peak_memory_mb),
            "parameters": amount(result.parameters),
        }

    groups = groupby(results, lambda row: (row.dataset, row.split))
    return [
        report.table_of(
            f"{dataset}: {SPLITS[split]}", rows, line, 1 + several, f"{dataset}-{split}"
        )
        for (dataset, split), rows in groups
    ]


def narrow(tables: Iterable[Section], missing: Iterable[str]) -> Iterator[Section]:
    """Each table as two: what is compared, with what is missing, and what it costs."""
    for table in tables:
        for kind, left_out, notes in (
            ("", COSTS, [COMPARED, *(f"Missing: {line}" for line in missing)]),
            (": costs", COMPARISON, [COSTING]),
        ):
            lines, bounds = (
                [{name: line[name] for name in line if name not in left_out} for line in some]
                for some in (table.lines, table.bounds)
            )
            yield replace(
                table,
                title=table.title + kind,
                lines=lines,
                bounds=bounds,
                footnotes=(*table.footnotes, *notes),
                label=table.label + kind,
            )


def csv_text(results: Sequence[Result]) -> str:
    """The rows as CSV: one number or name in each cell; unknown values are empty."""
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
    """One number per line: data set, variant, method, seed, split, metric, value."""
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


def _average(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None
