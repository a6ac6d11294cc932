"""The report: rows and sections to JSON, Markdown, CSV and the terminal (HTML: html.py).

Accuracies are fractions in files and per cent in what people read.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from sfkt_cli.console import console, printable, say
from sfkt_cli.files import read_record
from sfkt_cli.methods import METHODS
from sfkt_cli.settings.runs import Run

BOUNDS = ("oracle", "source-rgb")
"""Bounds: they see labels or RGB images of the target task, which no method may see."""
SPLITS = {
    "target": "Target images (those the methods trained on, without their labels)",
    "test": "Held-out test images",
}
MEANINGS = {
    "source-only": "the RGB source model on raw target images, copied into three channels",
    "source-encoded": "the source model on the student's encoding: where most methods start",
    "source-adapted": "the same with the batch statistics of the target images: where tgkt starts",
    "bridge-only": "the translator in front of the untouched source model",
    **{name: method.meaning for name, method in METHODS.items()},
    "tgkt+bridge": "geometric mean of tgkt and bridge-only, at the cost of both for every image",
    "oracle": "bound: the student's network trained with target labels",
    "source-rgb": "bound: the source model on the RGB partners of the test images",
}
"""What each row of a report is, for a reader who sees it for the first time."""
LABEL_FREE = "Label-free scores"
"""The title of the section with the scores that need no labels."""
NAMES = {
    "source-only": "RGB model",
    "source-encoded": "RGB model, encoded",
    "source-adapted": "RGB model, adapted",
    "bridge-only": "RGB model behind the translator",
    "tgkt+bridge": "student and translator together",
    "source-rgb": "RGB model on RGB images",
    "oracle": "trained with labels",
}
"""What people call the rows that ``evaluate`` adds to those of the methods, which are students."""
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
"""The page, the LaTeX table and the model card, as templates of Jinja beside this file."""
Line = dict[str, str]
"""A line of a table: each cell by the heading of its column."""


@dataclass(frozen=True)
class Row:
    """One method on one split."""

    method: str  # such as ``source-only`` or ``tgkt``
    seed: int  # of the run
    split: str  # ``target`` or ``test``
    n: int  # labelled images
    accuracy: float  # fraction
    accuracy_ci95: tuple[float, float]  # its 95 % interval
    balanced_accuracy: float  # mean recall of the classes
    macro_f1: float  # mean F1 of the classes
    ece: float  # expected calibration error, 15 bins
    # All that this model cost beyond the source model, the bridge included.
    train_seconds: float | None
    peak_memory_mb: float | None  # largest of the stages that made it; None: nothing was trained
    images_per_second: float | None = None  # of inference, on the machine that evaluated
    parameters: int | None = None  # of all networks that a prediction passes
    class_accuracy: tuple[float | None, ...] = ()  # by class; None for a class without images
    note: str | None = None  # what a reader must know of this row; becomes a footnote


class Results(BaseModel):
    """The content of results.json."""

    model_config = ConfigDict(allow_inf_nan=False)

    dataset: str
    classes: tuple[str, ...]  # names in the order of the labels
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Section:
    """A part of the report: text, a table, a picture, or some of these."""

    title: str  # heading
    text: tuple[str, ...] = ()  # paragraphs
    lines: Sequence[Line] = ()  # of a table
    picture: str | None = None  # name of a PNG beside the report
    caption: str = ""  # what the picture shows, for those who do not see it, too
    left: int = 1  # columns of the table, from the left, that hold words
    bounds: Sequence[Line] = ()  # lines of the table below a rule
    footnotes: tuple[str, ...] = ()  # below the table
    label: str = ""  # by which LaTeX refers to the table; from the title if there is none

    @property
    def header(self) -> list[str]:
        """The headings of the table; none without a table."""
        return [heading for line in [*self.lines, *self.bounds][:1] for heading in line]


@dataclass(frozen=True)
class Headline:
    """The first line of the report: is the student better?"""

    text: str  # one sentence in plain words
    detail: str = ""  # what it rests on
    tone: str = "open"  # ``better``, ``worse`` or ``open``: the colour of its box


@dataclass(frozen=True)
class Report:
    """All that is known about a run."""

    dataset: str  # its name
    rows: tuple[Row, ...]  # methods first, bounds last
    facts: tuple[str, ...] = ()  # how it was measured
    sections: tuple[Section, ...] = ()  # what follows the accuracies
    headline: Headline | None = None  # the first line
    made: str = ""  # when, by which version, of which model


def named(method: str) -> str:
    """The plain name, and in brackets the technical one: ``student (tgkt)``."""
    return f"{NAMES.get(method, 'student')} ({method})"


def meanings(rows: Iterable[Row]) -> tuple[tuple[str, str], ...]:
    """The methods of a report, in its order, and what they are."""
    names = dict.fromkeys(row.method for row in rows)
    return tuple((name, MEANINGS[name]) for name in names if name in MEANINGS)


def read_results(run: Run) -> Results:
    """The results.json of an evaluated run; raises DataError if it is missing or damaged."""
    return read_record(run.output("evaluate", "results.json"), Results, sealed=False)


def table_of(
    title: str, items: Iterable[Any], line_of: Callable[[Any], Line], left: int = 1, label: str = ""
) -> Section:
    """A table with a line for each item, which has a ``method`` and a ``note``.

    Bounds are below a rule. Notes become footnotes, with their numbers behind the methods.
    """
    lines, bounds = list[Line](), list[Line]()
    marks: dict[str, str] = {}
    for item in items:
        line = line_of(item)
        if item.note:
            line["method"] += " " + marks.setdefault(item.note, f"({len(marks) + 1})")
        (bounds if item.method in BOUNDS else lines).append(line)
    notes = tuple(f"{mark} {note}" for note, mark in marks.items())
    return Section(title, lines=lines, bounds=bounds, left=left, footnotes=notes, label=label)


def split_tables(
    rows: Sequence[Row], name: Callable[[str], str] = str
) -> list[tuple[list[Row], Section]]:
    """Each split's rows and their table; ``name`` says what a method is called in it."""

    def line(row: Row) -> Line:
        return {
            "method": name(row.method),
            "accuracy % ↑": percent(row.accuracy),
            "95 % interval": interval(row.accuracy_ci95),
            "balanced % ↑": percent(row.balanced_accuracy),
            "macro F1 % ↑": percent(row.macro_f1),
            "ECE % ↓": percent(row.ece),
            "training s ↓": amount(row.train_seconds),
            "memory MB ↓": amount(row.peak_memory_mb),
            "images/s ↑": amount(row.images_per_second),
            "parameters ↓": amount(row.parameters),
        }

    tables = []
    for split, title in SPLITS.items():
        if here := [row for row in rows if row.split == split]:
            counts = " or ".join(f"{count:,}" for count in sorted({row.n for row in here}))
            table = table_of(f"{title}, n = {counts}", here, line, label=split)
            tables.append((here, table))
    return tables


def to_markdown(report: Report) -> str:
    """The report as Markdown that is readable as it is; pictures lie beside it."""
    parts = [f"# {plain(report.dataset)}: evaluation"]
    if report.headline:
        parts += [f"**{plain(report.headline.text)}**", plain(report.headline.detail)]
    parts += [plain(report.made), bullets(report.facts)]
    for _, table in split_tables(report.rows):
        parts += markdown_section(table)
    parts.append(bullets(f"{name}: {text}" for name, text in meanings(report.rows)))
    for section in report.sections:
        parts += markdown_section(section)
    return printable("\n\n".join(filter(None, parts))) + "\n"


def bullets(lines: Iterable[str]) -> str:
    """Texts as a list of Markdown."""
    return "\n".join(f"- {plain(line)}" for line in lines)


def markdown_section(section: Section) -> list[str]:
    """The heading of a section, and its paragraphs, table and picture."""
    parts = [f"## {plain(section.title)}", *map(plain, section.text)]
    if section.header:
        parts += [markdown_table(section), *map(plain, section.footnotes)]
    if section.picture:
        parts += [f"![{plain(section.title)}]({section.picture})", plain(section.caption)]
    return parts


def markdown_table(table: Section) -> str:
    """The table of a section, with columns of even width and bounds under a rule of dashes."""
    lines = [table.header, *(line.values() for line in (*table.lines, *table.bounds))]
    texts = [[plain(cell) for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    left = range(table.left)

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    marks = [
        "-" * (w if i in left else w - 1) + ":" * (i not in left) for i, w in enumerate(widths)
    ]
    texts.insert(1, marks)
    if table.bounds:
        texts.insert(2 + len(table.lines), ["bounds", *["—" * 3] * (len(widths) - 1)])
    return "\n".join(map(line, texts))


def to_latex(report: Report) -> str:
    """The accuracies as LaTeX tables, one for each split; without accuracies, label-free scores."""
    name, tables = report.dataset, [table for _, table in split_tables(report.rows)]
    if not tables:
        tables = [section for section in report.sections if section.title == LABEL_FREE]
    return latex_tables(
        replace(table, title=f"{name}: {table.title}", label=f"{name}-{table.label}")
        for table in tables
    )


def latex_tables(tables: Iterable[Section]) -> str:
    """Tables as wide as the text, bounds below a rule; the best accuracy of a method is bold.

    Of methods that lack seeds, none is the best. The packages booktabs and graphicx are needed.
    """
    return "\n".join(map(_latex_table, tables))


def _latex_table(table: Section) -> str:
    header = table.header
    accuracy = next((name for name in header if name.startswith("accuracy %")), "")
    ranks = [(int(line.get("seeds", 1)), _leading(line.get(accuracy, ""))) for line in table.lines]
    top = max(ranks, default=None)

    def row(line: Line, rank: tuple[int, float] | None = None) -> str:
        texts = {heading: _latex(cell) for heading, cell in line.items()}
        if rank and rank == top and accuracy:
            texts[accuracy] = rf"\textbf{{{texts[accuracy]}}}"
        return " & ".join(texts.values()) + r" \\"

    label = re.sub(r"\W+", "-", table.label or table.title).strip("-")
    lines = [*map(row, table.lines, ranks)]
    if table.bounds:
        lines += [r"\midrule", *map(row, table.bounds)]
    return TEMPLATES.get_template("table.tex").render(
        title=_latex(table.title),
        label=label,
        columns="l" * table.left + "r" * (len(header) - table.left),
        header=row({heading: heading for heading in header}),
        lines=lines,
        notes=map(_latex, table.footnotes),
    )


_LATEX = str.maketrans(
    {mark: rf"\{mark}" for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "<": "$<$", ">": "$>$"}
)


def _latex(text: str) -> str:
    """Text that LaTeX shows as it is, with true minus signs and dashes."""
    shown = " ".join(printable(text).split()).translate(_LATEX).replace(" .. ", " -- ")
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", shown)


def _leading(text: str) -> float:
    """The number that a cell such as ``61.3 ± 0.4`` begins with; -1 where there is none."""
    try:
        return float(text.split(" ")[0])
    except ValueError:
        return -1.0


def plain(text: str) -> str:
    """Text that Markdown shows literally, on one line."""
    return " ".join(re.sub(r"[\\|<`*_\[]", r"\\\g<0>", printable(text)).split())


def to_csv(header: Sequence[str], rows: Iterable[Iterable[str | float]], exact: str = "") -> str:
    """CSV in which a spreadsheet sees no formulas: texts that look like one begin with '.

    The column of the name ``exact``, which programs read, such as paths, stays as it is.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_harmless, header))
    for row in rows:
        named_cells = zip(header, row, strict=True)
        writer.writerow(cell if name == exact else _harmless(cell) for name, cell in named_cells)
    return file.getvalue()


def joint_note(notes: Mapping[str, str | None]) -> str | None:
    """The notes of several rows as one, by names such as ``target`` or ``seed 3``.

    If not all rows have a note, it names those that have it.
    """
    having: dict[str, list[str]] = {}
    for name, note in notes.items():
        if note:
            having.setdefault(note, []).append(name)
    texts = (
        note if len(names) == len(notes) else f"{', '.join(names)}: {note}"
        for note, names in having.items()
    )
    return "; ".join(texts) or None


def say_table(table: Section, caption: str = "") -> None:
    """Print a table with its title and footnotes: a rich one on a terminal, Markdown elsewhere.

    If a terminal is too narrow, columns are left out, the last ones first.
    """
    if not console.is_terminal:
        say("\n".join(filter(None, [table.title, markdown_table(table), *table.footnotes])))
        return
    if table.title:
        say(table.title)
    rich = Table(
        caption=caption, box=box.HORIZONTALS, show_edge=False, padding=(0, 0, 0, 1), pad_edge=False,
    )  # fmt: skip
    lines = [
        {name: printable(text) for name, text in line.items()}
        for line in (*table.lines, *table.bounds)
    ]
    room, fitting = console.width + 2, list[str]()
    for number, name in enumerate(table.header):
        room -= 2 + max(len(text) for text in (name, *(line[name] for line in lines)))
        if room < 0:
            break
        rich.add_column(name, justify="left" if number < table.left else "right")
        fitting.append(name)
    for number, line in enumerate(lines, 1):
        rich.add_row(*(line[name] for name in fitting), end_section=number == len(table.lines))
    console.print(rich, markup=False)
    if left_out := table.header[len(fitting) :]:
        say(f"left out, because the terminal is too narrow: {', '.join(left_out)}")
    for note in table.footnotes:
        say(note)


def show(rows: Sequence[Row]) -> None:
    """Print the accuracies."""
    if not rows:
        return
    methods: dict[str, dict[str, Row]] = {}  # by method and split
    for row in rows:
        methods.setdefault(row.method, {})[row.split] = row

    splits = {row.split for row in rows}

    def line(first: Row) -> Line:
        accuracies = {f"{split} %": "-" for split in SPLITS if split in splits}
        for split, row in methods[first.method].items():
            accuracies[f"{split} %"] = f"{percent(row.accuracy)} ({interval(row.accuracy_ci95)})"
        return {
            "method": first.method,
            **accuracies,
            "training s": amount(first.train_seconds),  # the same for all splits
            "memory MB": amount(first.peak_memory_mb),
        }

    of_methods = [
        replace(next(iter(here.values())), note=joint_note({s: r.note for s, r in here.items()}))
        for here in methods.values()
    ]
    caption = "accuracy (95 % interval); below the rule: bounds, not methods"
    say_table(table_of("", of_methods, line), caption)


def percent(share: float | None) -> str:
    """``0.613`` is ``61.3``; nothing is ``-``."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def interval(bounds: Sequence[float] | None, unit: str = "") -> str:
    """``(0.58, 0.64)`` is ``58.0 .. 64.0``, with a unit behind it; nothing is ``-``."""
    return " .. ".join(map(percent, bounds)) + unit if bounds else "-"


def amount(value: float | None) -> str:
    """A number to three digits or in whole units, thousands apart; nothing is ``-``."""
    if value is None or math.isnan(value):
        return "-"
    value = round(value, 4) + 0.0  # without the noise of floats, and without -0
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"


def _harmless(cell: str | float) -> str | float:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r")) else cell
