"""Lines and tables of a user's text files: manifests, labels, lists of images."""

import csv
import io
import re
from collections.abc import Iterator

from sfkt_cli.errors import DataError


def lines_of(text: str) -> list[str]:
    """The lines of a text; ``str.splitlines`` also breaks at form feeds, U+0085 and U+2028."""
    return re.split("\r\n|\r|\n", text)


def csv_rows(path: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row of a CSV text, by the names in its first line, lowercase.

    Commas separate the columns, semicolons, as spreadsheets of some countries write them, or tabs.
    Empty rows, a spreadsheet's first line ``sep=;``, and empty columns without a name are left out.

    Raises:
        DataError: A column is given twice, a row has another number of columns, or quotes do not
            end; names ``path``.
    """
    lines = (line for line in lines_of(text) if line.strip() and not line.startswith("sep="))
    head = next(lines, "")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True
    )
    columns: list[str] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells) or (not columns and cells[0].startswith("sep=")):
                continue
            if not columns:
                columns = [cell.casefold() for cell in cells]
                for column in filter(None, columns):
                    if columns.count(column) > 1:
                        raise DataError(
                            f"{path}, line {reader.line_num}: column {column!r} is given twice"
                        )
                continue
            if len(cells) != len(columns):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns, the first line has "
                    f"{len(columns)}"
                )
            named = zip(columns, cells, strict=True)
            yield reader.line_num, {name: cell for name, cell in named if name or cell}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
