"""The report as one HTML page that needs nothing beside it: pictures inside, no scripts.

Light or dark as the reader's system says; on paper black on white. Rules, shapes and words carry
the meaning, colour only repeats it.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

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

PAGE = Path(__file__).with_name("report.html")
WIDE = 900  # pixels from which a picture is not shrunk to a telephone's width, but scrolled
MARKS = (
    '<p class="note">Accuracy in per cent, and its 95 % interval. A disc is a method; a hollow '
    "diamond, and italics in tables, a bound: it saw labels or RGB images of the task.</p>"
)


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
        names = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
            for name, text in meanings(report.rows)
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
    page = Template(PAGE.read_text(encoding="utf-8"))
    return printable(page.substitute(title=title, body=body))


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
