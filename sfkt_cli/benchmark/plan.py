"""What ``sfkt benchmark`` compares: its YAML file, and the cells that it unfolds into.

A cell is one run folder: a data set, a variant of the settings, a seed, and all methods.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from sfkt_cli.errors import ConfigError, DataError
from sfkt_cli.evaluation.report import BOUNDS, NAMES
from sfkt_cli.files import write_record
from sfkt_cli.methods import METHODS
from sfkt_cli.settings.config import Config, Sensor, UserPath, build, explained, merge, read_yaml
from sfkt_cli.settings.runs import Run

ROWS = tuple(NAMES)
SENSORS: tuple[Sensor, ...] = get_args(Sensor)
Settings = dict[str, Any]
Trial = dict[str, Any]  # an entry of tuning.json
TUNED = "-tuned"  # ends the name of the row of a method whose settings are chosen on each data set
GRID: Mapping[str, tuple[Any, ...]] = {
    "learning_rate": (0.01, 0.03, 0.001),
    "backbone_rate": (0.1, 1.0),
    "schedule": ("inverse", "cosine"),
}
"""What tuned methods try, all of them the same; SHOT's and SOCKET's own are the first."""
TUNE_BY = ("ti_rank", "tr_mirror")
"""The label-free score that chooses, the same for all methods; the second without pairs."""
SENSOR_SETTINGS = ("sun_rgbd.source_sensor", "sun_rgbd.target_sensor")
DECIDED = {
    "seed": "name the seeds in `seeds: [...]` instead",
    "evaluate.oracle": "add `oracle` to the methods instead, or leave it out of them",
}
"""Settings that the plan decides, and how."""


def _named(row: Any) -> Any:
    """``{name: socket, tune: true}`` is the row ``socket-tuned``."""
    if isinstance(row, dict) and isinstance(row.get("name"), str) and {*row} <= {"name", "tune"}:
        return row["name"] + TUNED * bool(row.get("tune"))
    return row


RowName = Annotated[str, BeforeValidator(_named)]


class _Part(BaseModel):
    """A part of a benchmark file, with the settings that it changes; dotted names are allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    settings: Settings = {}


class DatasetPlan(_Part):
    """A data set, and its name in the tables."""

    name: str = Field(min_length=1)
    # SUN RGB-D alone: ``all`` 16, or a list of [source, target]
    sensor_pairs: Literal["all"] | tuple[tuple[Sensor, Sensor], ...] = ()


class VariantPlan(_Part):
    """A change of the settings, its name in the tables, and its rows.

    Without ``methods``, the rows are those of the benchmark.
    """

    name: str = Field(min_length=1)
    methods: tuple[RowName, ...] | None = None


class SweepPlan(_Part):
    """One setting over several values, drawn as a curve; each value is a variant."""

    setting: str  # dotted name
    values: tuple[float, ...] = Field(min_length=1)
    name: str = "others at their default"  # name of the line; sweeps of one setting share a picture
    methods: tuple[RowName, ...] = ("tgkt",)  # rows that are shown

    def variant(self, value: float) -> VariantPlan:
        """The variant for one value."""
        return VariantPlan(
            name=f"{self.setting} = {value:g}, {self.name}",
            settings={**self.settings, self.setting: value},
            methods=self.methods,
        )


class BenchmarkPlan(_Part):
    """A benchmark file."""

    title: str = "Benchmark"
    # Folder for all of it, unless ``--output`` says another
    output: UserPath = Path("runs/benchmark")
    main: str = "tgkt"  # the method that the others are compared with
    # Rows that are shown; those that are methods are trained. ``{name: socket, tune: true}`` is the
    # row ``socket-tuned``: a label-free score chooses its rates and schedule.
    methods: tuple[RowName, ...] = (*ROWS[:3], *METHODS, *ROWS[3:])
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    datasets: tuple[DatasetPlan, ...] = ()  # none: that of the settings, under its own name
    # The others are compared with the first.
    variants: tuple[VariantPlan, ...] = Field((VariantPlan(name="default"),), min_length=1)
    sweeps: tuple[SweepPlan, ...] = ()  # further variants, drawn as curves

    @field_validator("seeds", "datasets", "variants")
    @classmethod
    def _differ(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [getattr(value, "name", value) for value in values]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} occurs twice")
        return values


DEMO = BenchmarkPlan(
    title="Built-in demo",
    methods=(*ROWS[:3], "shot", "socket", "distill", "tgkt", "oracle"),
    settings={"dataset": "synthetic", "synthetic.pairs": 2400},
)
"""Without a file: few methods on a small rendered data set."""


@dataclass(frozen=True)
class Cell:
    """One run folder."""

    dataset: str  # name of the data set, with the sensor pair
    variant: str
    seed: int
    rows: tuple[str, ...]  # methods and bounds that are shown
    config: Config  # all settings
    # What is trained: by row the method, and what differs in its section.
    students: Mapping[str, tuple[str, Settings]]
    trial: bool = False  # it tries settings for tuned rows, and is neither evaluated nor shown

    @property
    def folder(self) -> Path:
        """Its folder below the output folder."""
        last = "trials" if self.trial else f"seed-{self.seed}"
        return Path("cells", slug(self.dataset), slug(self.variant), last)


def read_plan(path: Path | None) -> BenchmarkPlan:
    """The plan of a YAML file, or that of the demo; raises one ConfigError for all problems."""
    if path is None:
        return DEMO
    try:
        return BenchmarkPlan.model_validate(read_yaml(path))
    except ValidationError as error:
        models = (BenchmarkPlan, DatasetPlan, VariantPlan, SweepPlan)
        keys = sorted({name for model in models for name in model.model_fields})
        problems = explained(error, keys, f"choose from {', '.join(keys)}")
        raise ConfigError(f"benchmark file {path}:\n" + "\n".join(problems)) from None


def cells_of(plan: BenchmarkPlan, overrides: Mapping[str, Any]) -> list[Cell]:
    """Unfold a plan, under ``overrides``; seeds last, so that the first cells show what works.

    Raises:
        ConfigError: All settings and method names that are wrong, in one message.
    """
    datasets = list(_datasets(plan))
    swept = [sweep.variant(value) for sweep in plan.sweeps for value in sweep.values]
    variants = [*plan.variants, *swept]
    parts: tuple[DatasetPlan | VariantPlan, ...] = (*datasets, *variants)
    problems: list[str] = []
    for settings in (plan.settings, *(part.settings for part in parts), overrides):
        for name, value in merge(settings).items():
            if name in DECIDED:
                problems.append(f"{name} = {value}: {DECIDED[name]}")
    for alternatives, (name, value) in product((datasets, variants), merge(overrides).items()):
        values = {part.name: merge(part.settings).get(name) for part in alternatives}
        named = [part for part, own in values.items() if own is not None]
        differ = len({repr(own) for own in values.values()}) > 1
        if differ or (named and name in SENSOR_SETTINGS):  # sensors are part of the name
            problems.append(
                f"{name} = {value} for all would make {named[0]!r} something else than its "
                "name says: change the setting in the benchmark file instead"
            )
    possible = (*METHODS, *ROWS, *(name + TUNED for name in METHODS))
    choices = f"is unknown: choose from {', '.join(possible)}"
    compared = [row for row in variants[0].methods or plan.methods if row not in BOUNDS]
    if plan.main not in possible:
        problems.append(f"main {plan.main!r} {choices}")
    elif len(compared) > 1 and not {plan.main, plan.main + TUNED} & {*compared}:
        problems.append(
            f"main {plan.main!r} is not among the methods {', '.join(compared)}: add it, or name "
            "one of these as `main`, with which the others are compared"
        )
    cells = []
    for seed, dataset, variant in product(plan.seeds, datasets, variants):
        if not (rows := variant.methods or plan.methods):
            continue
        problems += [
            f"{variant.name}: method {row!r} {choices}" for row in rows if row not in possible
        ]
        extra = {"seed": seed, "evaluate": {"oracle": "oracle" in rows}}
        plain = {"evaluate": {"pictures": False}}  # those of many cells would take long
        layers = (plain, plan.settings, dataset.settings, variant.settings)
        try:
            config = build(*layers, overrides, extra)
        except ConfigError as error:
            problems.append(f"{dataset.name}, {variant.name}: {error}")
            continue
        name = dataset.name if plan.datasets else config.dataset
        cells.append(Cell(name, variant.name, seed, rows, config, students_of(rows)))
    problems += [
        f"two variants or data sets share the folder {folder}: name them apart"
        for folder, count in sorted(Counter(cell.folder for cell in cells).items())
        if count > 1
    ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))  # each seed has the same
    return cells


def students_of(rows: Iterable[str]) -> dict[str, tuple[str, Settings]]:
    """The rows that are trained, with their methods; tuned rows have no settings yet."""
    trained = {row: (row.removesuffix(TUNED), Settings()) for row in rows}
    if "tgkt+bridge" in trained:
        trained.setdefault("tgkt", ("tgkt", {}))
    return {row: student for row, student in trained.items() if student[0] in METHODS}


def trial_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Trials of the tuned methods, on the first seed of each data set and variant."""
    trials = []
    for cell in (cell for cell in cells if cell.seed == cells[0].seed):
        students: dict[str, tuple[str, Settings]] = {
            f"{row}-{number}": (method, dict(zip(GRID, values, strict=True)))
            for row, (method, _) in cell.students.items()
            if row.endswith(TUNED)
            for number, values in enumerate(product(*GRID.values()))
        }
        if students:
            trials.append(replace(cell, rows=(), students=students, trial=True))
    return trials


def tuned(
    cells: Iterable[Cell], trials: Iterable[Cell], output: Path
) -> tuple[list[Cell], list[Trial]]:
    """The cells with the settings that the label-free score chose, and all finished trials.

    A method without a finished trial is left out. The trials are also written to tuning.json.
    """
    records: list[Trial] = []
    for cell in trials:
        run = Run(output / cell.folder)
        for row, (method, changes) in cell.students.items():
            stage = f"transfer/{row}"
            if not run.finished(stage) or not (epochs := run.metrics(stage)):
                continue
            done = run.record(stage)
            scores = epochs[done["best_epoch"] - 1]
            score = next((name for name in TUNE_BY if name in scores), None)
            if score is None:
                raise DataError(
                    f"{run.path('transfer', row)} is of an earlier version and has no "
                    f"{' or '.join(TUNE_BY)}: delete the folder"
                )
            records.append(
                {"dataset": cell.dataset, "variant": cell.variant, "method": method,
                 "settings": dict(changes), "score": score, "value": scores[score],
                 "seconds": done["seconds"], "chosen": False}
            )  # fmt: skip
    best: dict[tuple[str, ...], Trial] = {}
    for record in sorted(records, key=lambda record: -record["value"]):
        best.setdefault((record["dataset"], record["variant"], record["method"]), record)
    for record in best.values():
        record["chosen"] = True
    if records:
        write_record(output / "tuning.json", {"trials": records})

    def settled(cell: Cell) -> Cell:
        students = {row: own for row, own in cell.students.items() if not row.endswith(TUNED)}
        for (dataset, variant, method), trial in best.items():
            if (dataset, variant) == (cell.dataset, cell.variant):
                students[method + TUNED] = method, trial["settings"]
        return replace(cell, students=students)

    return [settled(cell) for cell in cells], records


def slug(name: str) -> str:
    """A name as a folder: letters, digits, dots, dashes."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "unnamed"


def _datasets(plan: BenchmarkPlan) -> Iterator[DatasetPlan]:
    every = tuple(product(SENSORS, SENSORS))
    for dataset in plan.datasets or (DatasetPlan(name="data"),):
        pairs = every if dataset.sensor_pairs == "all" else dataset.sensor_pairs
        if not pairs:
            yield dataset
        for source, target in pairs:
            sensors = dict(zip(SENSOR_SETTINGS, (source, target), strict=True))
            name = f"{dataset.name} {source} to {target}"
            yield DatasetPlan(name=name, settings={**dataset.settings, **sensors})
