"""The report as one HTML page that needs nothing beside it: pictures inside, no scripts.

Light or dark as the reader's system says; on paper black on white. Rules, shapes and words carry
the meaning, colour only repeats it.
"""

import base64
from pathlib import Path

from markupsafe import Markup, escape

from sfkt_cli.console import printable
from sfkt_cli.evaluation.report import (
    BOUNDS,
    TEMPLATES,
    Report,
    meanings,
    named,
    percent,
    split_tables,
)


def to_html(report: Report, folder: Path) -> str:
    """The page; ``folder`` is where the pictures of its sections lie."""

    def picture(name: str) -> tuple[int, str]:
        """Width in pixels, and content in base64, of a PNG."""
        content = (folder / name).read_bytes()
        return int.from_bytes(content[16:20], "big"), base64.b64encode(content).decode("ascii")

    tables = split_tables(report.rows, named)
    contents = [table.title for _, table in tables] + ["What the names mean"] * bool(tables)
    contents += ["How it was measured", *(section.title for section in report.sections)]
    page = TEMPLATES.get_template("report.html").render(
        title=f"{report.dataset}: evaluation",
        report=report,
        tables=tables,
        contents=contents,
        meanings=meanings(report.rows),
        bounds=BOUNDS,
        picture=picture,
    )
    return printable(page)


def unbroken(text: str) -> Markup:
    """Text whose numbers keep their per cent sign and their interval on the same line."""
    together = escape(text).replace(" %", Markup("&nbsp;%"))
    return together.replace(" .. ", Markup("&nbsp;..&nbsp;"))


def across(share: float) -> str:
    """Place of a share in a chart that is as wide as the page."""
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


TEMPLATES.filters |= {"percent": percent, "unbroken": unbroken, "across": across}
