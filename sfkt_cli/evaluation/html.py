"""The report as one HTML page that needs nothing beside it: pictures inside, no scripts.

Light or dark as the reader's system says; on paper black on white. Rules, shapes and words carry
the meaning, colour only repeats it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sfkt_cli.console import printable
from sfkt_cli.evaluation.report import (
    BOUNDS,
    SPLITS,
    Cells,
    Report,
    Row,
    meanings,
    percent,
    split_tables,
)

WIDE = 900
"""Pixels from which a picture is not shrunk to a telephone's width, but scrolled."""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff;
  --line: #d0d7de; --method: #0072b2; --bound: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1;
  --paper: #0d1117; --line: #3d444d; --method: #56b4e9; --bound: #e69f00; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.words2 :is(th, td):nth-child(2) { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); white-space: normal; vertical-align: bottom; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody.bounds { border-top: 2px solid var(--ink); font-style: italic; }
.note, figcaption { color: var(--soft); font-size: .85rem; }
dl.note { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dl.note dt { font-weight: 600; } dl.note dd { margin: 0; }
figure { margin: 1rem 0; }
svg { width: 100%; max-width: 46rem; }
@media screen { .scroll > svg { min-width: 34rem; } .scroll > .wide { min-width: 44rem; } }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .soft { fill: var(--soft); }
svg .method { stroke: var(--method); fill: var(--method); }
svg .bound { stroke: var(--bound); fill: var(--paper); }
svg line.bound { stroke-dasharray: 4 3; }
@media print { :root { --ink: #000; --soft: #333; --paper: #fff; --line: #999; --method: #0072b2;
  --bound: #b35900; color-scheme: light; } body { max-width: none; margin: 0; font-size: 11pt; }
  table { font-size: 8pt; } th, td { padding: .15rem .35rem; }
  figure, table, svg { break-inside: avoid; } h2, p.lead, .scroll:has(> svg) { break-after: avoid; }
  .scroll { overflow: visible; } }
"""


def to_html(report: Report, folder: Path) -> str:
    """The page.

    Args:
        report: What it says.
        folder: Where the pictures of its sections lie.
    """
    title = escape(f"{report.dataset}: evaluation")
    parts = [f"<h1>{title}</h1>"]
    if report.facts:
        facts = "".join(f"<li>{escape(fact)}</li>" for fact in report.facts)
        parts.append(f"<ul>{facts}</ul>")
    for split, table in zip(_splits(report.rows), split_tables(report.rows), strict=True):
        parts.append(f"<h2>{escape(table.title)}</h2>")
        parts.append(interval_chart([row for row in report.rows if row.split == split]))
        parts.append(_table(table.header, table.methods, table.bounds))
        parts += [f'<p class="note">{escape(note)}</p>' for note in table.footnotes]
    parts.append(_legend(report.rows))
    for section in report.sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f'<p class="lead">{escape(text)}</p>' for text in section.text]
        if section.cells:
            parts.append(_table(section.header, section.cells, left=section.left))
        if section.picture:
            parts.append(_picture(folder / section.picture, section.caption))
    body = "\n".join(parts)
    return printable(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def interval_chart(rows: Sequence[Row]) -> str:
    """Accuracies and their intervals as SVG: methods are discs, bounds hollow diamonds."""
    left, width, step = 150, 520, 26
    height = step * len(rows) + 34
    label = "; ".join(f"{row.method} {percent(row.accuracy)} %" for row in rows)
    parts = [
        f'<div class="scroll"><svg viewBox="0 0 {left + width + 70} {height}" role="img" '
        f'aria-label="{escape(label, quote=True)}">'
    ]
    for tick in range(0, 101, 20):
        x = left + width * tick / 100
        parts.append(f'<line class="axis" x1="{x}" y1="4" x2="{x}" y2="{height - 26}"/>')
        parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{tick} %</text>')
    for number, row in enumerate(rows):
        kind = "bound" if row.method in BOUNDS else "method"
        y = step * number + 18
        low, x, high = (
            left + width * min(max(value, 0.0), 1.0)
            for value in (row.accuracy_ci95[0], row.accuracy, row.accuracy_ci95[1])
        )
        shape = (
            f'<path class="bound" stroke-width="2" d="M{x - 6:.1f} {y}l6 -6l6 6l-6 6z"/>'
            if kind == "bound"
            else f'<circle class="method" cx="{x:.1f}" cy="{y}" r="5"/>'
        )
        parts.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(row.method)}</text>'
            f'<line class="{kind}" stroke-width="2" x1="{low:.1f}" y1="{y}" '
            f'x2="{high:.1f}" y2="{y}"/>{shape}'
            f'<text class="soft" x="{left + width + 12}" y="{y + 4}">{percent(row.accuracy)}</text>'
        )
    return "\n".join([*parts, "</svg></div>"])


def _legend(rows: Sequence[Row]) -> str:
    """What the rows are, and how the chart tells methods from bounds."""
    if not rows:
        return ""
    names = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in meanings(rows)
    )
    marks = (
        "Chart: accuracy and its 95 % interval. A disc is a method; a hollow diamond, and italics "
        "in the table, a bound: it saw labels or RGB images of the task."
    )
    return f'<p class="note">{marks}</p>\n<dl class="note">{names}</dl>'


def _splits(rows: Sequence[Row]) -> list[str]:
    present = {row.split for row in rows}
    return [split for split in SPLITS if split in present]


def _table(
    header: Cells, cells: Sequence[Cells], bounds: Sequence[Cells] = (), left: int = 1
) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    bodies = f"<tbody>{_rows(cells)}</tbody>"
    if bounds:
        bodies += f'<tbody class="bounds">{_rows(bounds)}</tbody>'
    table = f'<table class="words{left}"><thead><tr>{head}</tr></thead>{bodies}</table>'
    return f'<div class="scroll">{table}</div>'


def _rows(cells: Sequence[Cells]) -> str:
    return "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in cells
    )


def _picture(path: Path, caption: str) -> str:
    picture = path.read_bytes()
    data = base64.b64encode(picture).decode("ascii")
    text = escape(caption, quote=True)
    wide = ' class="wide"' if _width(picture) >= WIDE else ""
    image = f'<img{wide} alt="{text}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{text}</figcaption></figure>'


def _width(picture: bytes) -> int:
    """Pixels across, from the header of a PNG."""
    return int.from_bytes(picture[16:20], "big")
