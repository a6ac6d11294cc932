"""The report as one HTML page that needs nothing beside it: pictures inside, no scripts.

Light or dark as the reader's system says; on paper black on white. Rules, shapes and words carry
the meaning, colour only repeats it.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sfkt_cli.console import printable
from sfkt_cli.evaluation.report import (
    BOUNDS,
    Line,
    Report,
    Row,
    Section,
    meanings,
    named,
    percent,
    split_tables,
)

WIDE = 900  # pixels from which a picture is not shrunk to a telephone's width, but scrolled
MARKS = (
    '<p class="note">Accuracy in per cent, and its 95 % interval. A disc is a method; a hollow '
    "diamond, and italics in tables, a bound: it saw labels or RGB images of the task.</p>"
)
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff;
  --line: #d0d7de; --method: #0072b2; --bound: #b35900;
  --better: #1a7f37; --worse: #b42318; --open: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1;
  --paper: #0d1117; --line: #3d444d; --method: #56b4e9; --bound: #e69f00;
  --better: #3fb950; --worse: #ff7b72; --open: #e3b341; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1rem; font-weight: 400; color: var(--soft); }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.box { border: 2px solid var(--tone); border-left-width: 10px; border-radius: 6px;
  padding: .8rem 1.1rem; background: color-mix(in srgb, var(--tone) 10%, var(--paper)); }
.box p { margin: 0; } .box .first { font-size: 1.45rem; font-weight: 600; line-height: 1.3; }
.better { --tone: var(--better); } .worse { --tone: var(--worse); } .open { --tone: var(--open); }
details { border-top: 1px solid var(--line); } summary { font-size: 1.1rem; font-weight: 600;
  padding: .6rem 0; cursor: pointer; } details > div { padding-bottom: 1.5rem; }
nav { margin: 2rem 0 1rem; line-height: 1.8; } a { color: var(--method); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8.5rem;
  position: sticky; left: 0; background: var(--paper); }
.words2 :is(th, td):nth-child(2) { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); white-space: normal; vertical-align: bottom; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody.bounds { border-top: 2px solid var(--ink); font-style: italic; }
.note, figcaption { color: var(--soft); font-size: .85rem; }
dl.note { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dl.note dt { font-weight: 600; } dl.note dd { margin: 0; }
figure { margin: 1rem 0; }
.chart { padding: 0 8px; max-width: 46rem; } svg { width: 100%; overflow: visible; }
@media screen { .scroll > .wide { min-width: 44rem; } }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; paint-order: stroke;
  stroke: var(--paper); stroke-width: 4px; }
svg .axis { stroke: var(--line); } svg .soft { fill: var(--soft); }
svg .method { stroke: var(--method); fill: var(--method); }
svg .bound { stroke: var(--bound); fill: var(--paper); }
svg line.bound { stroke-dasharray: 4 3; }
@media print { :root { --ink: #000; --soft: #333; --paper: #fff; --line: #999; --method: #0072b2;
  --bound: #b35900; --better: #1a7f37; --worse: #b42318; --open: #8a6100; color-scheme: light; }
  nav { display: none; } details::details-content { content-visibility: visible; height: auto; }
  body { max-width: none; margin: 0; font-size: 11pt; }
  table { font-size: 8pt; } th, td { padding: .15rem .35rem; }
  figure, table, svg { break-inside: avoid; } h2, p.lead, summary { break-after: avoid; }
  .scroll { overflow: visible; } }
"""


def to_html(report: Report, folder: Path) -> str:
    """The page; ``folder`` is where the pictures of its sections lie."""
    title = escape(f"{report.dataset}: evaluation")
    parts = [f"<h1>{title}</h1>"]
    if report.headline:
        line = report.headline
        parts.append(
            f'<div class="box {line.tone}"><p class="first">{_unbroken(line.text)}</p>'
            f"<p>{_unbroken(line.detail)}</p></div>"
        )
    parts.append(f'<p class="note">{escape(report.made)}</p>')
    details: list[tuple[str, str]] = []
    tables = split_tables(report.rows, named)
    for rows, table in tables[:-1]:
        details.append((table.title, interval_chart(rows, table) + _section(table, folder)))
    if tables:
        rows, table = tables[-1]
        chart = interval_chart(rows, table)
        parts += [f"<h2>{escape(table.title)}</h2>", chart, *_footnotes(table), MARKS]
        details.append((table.title, _section(table, folder)))
        explained = meanings(report.rows)
        names = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in explained
        )
        details.append(("What the names mean", f'<dl class="note">{names}</dl>'))
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in report.facts)
    details.append(("How it was measured", f"<ul>{facts}</ul>"))
    details += [(section.title, _section(section, folder)) for section in report.sections]
    links, folded = list[str](), list[str]()
    for number, (name, content) in enumerate(details):
        links.append(f'<a href="#part{number}">{escape(name)}</a>')
        content = f'<div id="part{number}">{content}</div>'
        folded.append(f"<details><summary>{escape(name)}</summary>{content}</details>")
    body = "\n".join([*parts, f"<nav><b>Contents:</b> {' · '.join(links)}</nav>", *folded])
    return printable(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def interval_chart(rows: Sequence[Row], table: Section) -> str:
    """Accuracies and their intervals as SVG: methods are discs, bounds hollow diamonds.

    The rows, bounds last, have the names and marks of their ``table``. Places across are shares of
    the width, so that letters keep their size on a telephone.
    """
    step = 44
    height = step * len(rows) + 26
    names = [line["method"] for line in (*table.lines, *table.bounds)]
    pairs = zip(names, rows, strict=True)
    label = escape("; ".join(f"{name} {percent(row.accuracy)} %" for name, row in pairs))
    parts = [f'<div class="chart"><svg height="{height}" role="img" aria-label="{label}">']
    for tick in range(0, 101, 25):
        parts.append(f'<line class="axis" x1="{tick}%" y1="4" x2="{tick}%" y2="{height - 22}"/>')
        parts.append(f'<text x="{tick}%" y="{height - 6}" text-anchor="middle">{tick}</text>')
    for number, row in enumerate(rows):
        kind = "bound" if row.method in BOUNDS else "method"
        y = step * number + 32
        low, high = (100 * min(max(value, 0.0), 1.0) for value in row.accuracy_ci95)
        x = 100 * row.accuracy
        shape = (
            f'<svg x="{x:.1f}%" y="{y}" height="1" width="1">'
            '<path class="bound" stroke-width="2" d="M-6 0l6-6l6 6l-6 6z"/></svg>'
            if kind == "bound"
            else f'<circle class="method" cx="{x:.1f}%" cy="{y}" r="5"/>'
        )
        parts.append(
            f'<text x="0" y="{y - 12}">{escape(names[number])}</text>'
            f'<text x="100%" y="{y - 12}" text-anchor="end">{percent(row.accuracy)} %</text>'
            f'<line class="{kind}" stroke-width="2" x1="{low:.1f}%" y1="{y}" '
            f'x2="{high:.1f}%" y2="{y}"/>{shape}'
        )
    return "\n".join([*parts, "</svg></div>"])


def _section(section: Section, folder: Path) -> str:
    parts = [f'<p class="lead">{escape(text)}</p>' for text in section.text]
    if section.header:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in section.header)
        bodies = f"<tbody>{_rows(section.lines)}</tbody>"
        if section.bounds:
            bodies += f'<tbody class="bounds">{_rows(section.bounds)}</tbody>'
        table = f'<table class="words{section.left}"><thead><tr>{head}</tr></thead>{bodies}</table>'
        parts.append(f'<div class="scroll">{table}</div>')
    parts += _footnotes(section)
    if section.picture:
        parts.append(_picture(folder / section.picture, section.caption))
    return "".join(parts)


def _footnotes(section: Section) -> list[str]:
    return [f'<p class="note">{escape(note)}</p>' for note in section.footnotes]


def _rows(lines: Sequence[Line]) -> str:
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in line.values()) for line in lines)
    return "".join(f"<tr>{row}</tr>\n" for row in rows)


def _picture(path: Path, caption: str) -> str:
    picture, text = path.read_bytes(), escape(caption)
    width = int.from_bytes(picture[16:20], "big")  # of the header of a PNG
    wide = ' class="wide"' if width >= WIDE else ""
    inline = base64.b64encode(picture).decode("ascii")
    image = f'<img{wide} alt="{text}" src="data:image/png;base64,{inline}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{text}</figcaption></figure>'


def _unbroken(text: str) -> str:
    """Text whose numbers keep their per cent sign and their interval on the same line."""
    return escape(text).replace(" %", "&nbsp;%").replace(" .. ", "&nbsp;..&nbsp;")
