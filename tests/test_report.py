import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfkt_cli.console import console, printable
from sfkt_cli.evaluation import figures, report
from sfkt_cli.evaluation.html import to_html
from sfkt_cli.evaluation.report import Headline, Report, Row, Section
from sfkt_cli.files import write_json, write_record
from sfkt_cli.methods import METHODS
from sfkt_cli.settings.runs import Run

NASTY = '<script>alert("1")</script> | $x_1$ *b*'
TGKT = Row("tgkt", 3, "target", 200, 0.6125, (0.55, 0.66), 0.6, 0.59, 0.1, 12.5, 900.0)
ORACLE = replace(TGKT, method="oracle", accuracy=1.0, accuracy_ci95=(1.0, 1.0), note="cheats")


def _report(picture: str | None = None) -> Report:
    section = Section(NASTY, (NASTY,), [{"class": NASTY, "n": "1"}], picture, NASTY)
    return Report(NASTY, (TGKT, ORACLE), (NASTY,), (section,))


def test_results_survive_json(tmp_path: Path) -> None:
    results = report.Results(dataset="made", classes=("a",), rows=(TGKT, ORACLE))
    written = results.model_dump(mode="json")
    assert written["rows"][0]["accuracy_ci95"] == [0.55, 0.66]
    written["rows"][0]["something_new"] = 1
    run = Run(tmp_path)
    write_json(run.path("evaluate", "results.json"), written)
    write_record(run.path("evaluate", "done.json"), {"stage": "evaluate"})
    assert report.read_results(run).rows[0] == TGKT


def test_markdown_tables_are_straight_and_bounds_lie_below_a_rule() -> None:
    text = report.to_markdown(_report())
    table = [line for line in text.split("## ")[1].splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[1] for line in table] == [
        "method", "-" * 10, "tgkt", "bounds", "oracle",
    ]  # fmt: skip
    assert "61.3" in table[2].replace("61.2", "61.3")
    assert "55.0 .. 66.0" in table[2]
    assert "(1) cheats" in text


def test_markdown_shows_marks_as_they_are() -> None:
    text = report.to_markdown(_report())
    assert "<script>" not in text.replace("\\<script>", "")
    assert "\\|" in text
    assert "\\*b\\*" in text


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    page = to_html(_report("p.png"), tmp_path)
    assert "<script" not in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert page.count("<svg") == page.count("</svg>") == 2  # the chart, and its diamond inside


@pytest.mark.parametrize("tone", ["better", "worse", "open"])
def test_the_verdict_comes_first_and_all_else_is_folded(tmp_path: Path, tone: str) -> None:
    line = Headline("The student recognises 95.6 % of the images.", NASTY, tone)
    page = to_html(replace(_report(), headline=line, made="2030-01-01"), tmp_path)
    body = page.split("<main>")[1]
    first = body.index("recognises 95.6&nbsp;%")
    assert f'class="box {tone}"' in body[:first]
    assert first < body.index("2030-01-01") < body.index("<svg")
    assert body.index("<svg") < body.index("Contents") < body.index("<details>")
    assert body.count('href="#part') == body.count("<details>") == body.count("</details>")
    text = report.to_markdown(replace(_report(), headline=line))
    assert text.splitlines()[2] == "**The student recognises 95.6 % of the images.**"


def test_every_row_of_a_report_is_explained(tmp_path: Path) -> None:
    assert set(report.MEANINGS) >= {*METHODS, *report.BOUNDS, "source-only", "bridge-only"}
    page = to_html(_report(), tmp_path)
    assert report.MEANINGS["tgkt"] in report.to_markdown(_report())
    assert "<dt>oracle</dt><dd>bound: " in page


def test_bounds_differ_from_methods_by_shape() -> None:
    wide = replace(TGKT, accuracy_ci95=(-0.1, 1.2))
    chart = to_html(replace(_report(), rows=(wide, ORACLE)), Path()).split('class="chart"')[1]
    assert chart.count("<circle") == 1
    assert chart.count("<path") == 1
    assert ">trained with labels (oracle) (1)</text>" in chart
    assert 'x1="0.0%"' in chart
    assert 'x2="100.0%"' in chart


def test_marks_of_the_chart_are_explained_below_it(tmp_path: Path) -> None:
    page = to_html(_report(), tmp_path)
    chart, below = page.index("oracle) (1)</text>"), page.index('<p class="note">(1) cheats')
    assert chart < below < page.index("Contents:")


def test_csv_holds_no_formulas() -> None:
    cells: list[str | float] = ["=1+1", "+1", "-x", "@a", "\t=1", 'a "b", c', "", -0.5]
    text = report.to_csv(["=h"] * len(cells), [cells])
    header, row = csv.reader(text.splitlines())
    assert header == ["'=h"] * len(cells)
    assert row == ["'=1+1", "'+1", "'-x", "'@a", "'\t=1", 'a "b", c', "", "-0.5"]


def test_off_a_terminal_the_table_is_plain(capfd: pytest.CaptureFixture[str]) -> None:
    report.show([TGKT, replace(TGKT, split="test"), ORACLE])
    lines = capfd.readouterr().err.splitlines()
    *table, note = lines
    assert [line.split()[1] for line in table] == ["method", "-" * 10, "tgkt", "bounds", "oracle"]
    assert "| oracle (1) |" in table[-1]
    assert note == "(1) cheats"
    report.show([])
    assert capfd.readouterr().err == ""


def test_on_a_terminal_of_80_columns_the_table_is_whole_and_ruled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = [
        replace(row, split=split, accuracy_ci95=(0.999, 1.0), train_seconds=1234.0)
        for row in (replace(TGKT, method="tgkt+bridge"), ORACLE)
        for split in report.SPLITS
    ]
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "width", 80)
    with console.capture() as caught:
        report.show(both)
    lines = caught.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in caught.get()
    rules = [number for number, line in enumerate(lines) if set(line.strip()) == {"─"}]
    assert "oracle (1)" in lines[rules[-1] + 1]
    assert lines[-1] == "(1) cheats"
    assert sum("99.9 .. 100.0" in line for line in lines) == 2


def test_of_a_wide_table_a_terminal_shows_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "width", 80)
    numbers = {f"column {number}": "22.2 ± 16.7" for number in range(9)}
    with console.capture() as caught:
        report.say_table(
            Section("t", lines=[{"method": name, **numbers} for name in ("a[b]\x1b[2J", "c")])
        )
    _, header, _, first, _, *rest = caught.get().splitlines()
    assert header.split()[-2:] == ["column", "4"]
    assert first.split() == [r"a[b]\x1b[2J", *["22.2", "±", "16.7"] * 5]
    assert "narrow: column 5, column 6, column 7, column 8" in " ".join(" ".join(rest).split())


def test_numbers_are_short() -> None:
    assert [report.percent(v) for v in (0.6, None, float("nan"))] == ["60.0", "-", "-"]
    assert [report.amount(v) for v in (None, 0, 12.34, 12345.6)] == ["-", "0", "12.3", "12,346"]
    assert [report.amount(v) for v in (1.83e-8, -1.19e-7, -0.815)] == ["0", "0", "-0.815"]


def test_pictures_take_names_with_dollars_and_foreign_letters(tmp_path: Path) -> None:
    names = [NASTY, "$a", "漢字", "a_very_long_name_indeed"]
    figures.draw_confusion(tmp_path / "c.png", {NASTY: np.eye(4, dtype=int)}, names)
    strips = [figures.Strip("t", np.zeros((2, 8, 8, 3)), ("$a$", "漢"), (True, False))]
    figures.draw_gallery(tmp_path / "g.png", strips)
    bins = (np.arange(15), np.linspace(0, 1, 15), np.linspace(0, 1, 15))
    figures.draw_reliability(tmp_path / "r.png", {"m": bins})
    rows = [{"epoch": 1, "seconds": 1.0, "learning_rate": 0.1, "kl": 1.0, "ti_agreement": 0.5}]
    figures.draw_curves(tmp_path / "k.png", {"s": rows}, {"s": 1})
    for name in "cgrk":
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()
            assert picture.size[0] > 100
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_a_term_that_begins_late_has_a_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    usual = {"seconds": 1.0, "learning_rate": 0.1, "kl": 0.5}
    rows = [{"epoch": 1, **usual}, {"epoch": 2, **usual, "im": -1.0}]
    figures.draw_curves(tmp_path / "k.png", {"tgkt": rows}, {})
    (figure,) = drawn
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == ["information maximisation (im)", "distillation (kl)"]
    figures.draw_curves(tmp_path / "k.png", {"tgkt": rows[:1]}, {})
    (axis,) = (axis for axis in drawn[-1].axes if axis.get_visible())
    assert axis.get_xlabel() == "epoch"
    assert axis.get_xlim() == (0.5, 1.5)


def test_two_axes_are_those_of_largest_variance() -> None:
    random = np.random.default_rng(0)
    wide = random.normal(size=(300, 3)) * [9, 3, 0.1]
    sets, share = figures.two_axes({"a": wide[:100], "b": wide[100:]})
    together = np.concatenate([sets["a"], sets["b"]])
    assert together.std(axis=0) == pytest.approx(wide.std(axis=0)[:2], rel=1e-2)
    assert share > 0.99


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme", [0, 1])
def test_page_fills_a_browser_in_dark_and_light(tmp_path: Path, scheme: int) -> None:
    (tmp_path / "page.html").write_text(to_html(_report(), tmp_path), encoding="utf-8")
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", "--disable-sync",
            "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1000,700", f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    corner = pixels[:10, :10].mean()
    assert corner > 250 if scheme else corner < 30
    assert np.abs(pixels - corner).max() > 150


def test_latex_shows_texts_as_they_are_and_the_best_method_in_bold() -> None:
    rows = [("a_b", "61.3 ± 0.4", "7"), ("c&d", "9.0", "8"), ("e", "-", "9"), ("z", "99", "1")]
    *methods, bound = (dict(zip(("m", "accuracy %", "n"), row, strict=True)) for row in rows)
    table = Section("50 % of {x}", lines=methods, bounds=[bound], left=2, footnotes=("(1) 5 %",))
    text = report.latex_tables([table])
    lines = text.splitlines()
    assert r"a\_b & \textbf{61.3 $\pm$ 0.4} & 7 \\" in lines
    assert r"c\&d & 9.0 & 8 \\" in lines
    assert r"z & 99 & 1 \\" in lines
    assert r"\caption{50 \% of \{x\}}" in lines
    assert r"\begin{tabular}{llr}" in lines
    assert {r"\centering", r"\label{tab:50-of-x}"} <= {*lines}
    assert r"\par {\footnotesize (1) 5 \%}" in lines


def test_what_latex_refers_to_stays_when_images_are_added() -> None:
    def labels(count: int) -> list[str]:
        rows = tuple(replace(row, n=count) for row in (TGKT, replace(TGKT, split="test")))
        return re.findall(r"\\label.*", report.to_latex(Report("my data", rows)))

    assert labels(100) == labels(90)
    assert len({*labels(100)}) == 2
    assert all("my-data" in label for label in labels(100))


def test_latex_has_true_minus_signs_and_dashes() -> None:
    line = {"method": "tgkt-tuned", "difference": "-3.3", "interval": "-6.0 .. -0.6", "p": "-"}
    text = report.latex_tables([Section("t", lines=[line])])
    assert r"tgkt-tuned & $-$3.3 & $-$6.0 -- $-$0.6 & - \\" in text


def test_a_note_of_some_rows_names_them() -> None:
    assert report.joint_note({"target": "cheats", "test": "cheats"}) == "cheats"
    assert report.joint_note({"target": "cheats", "test": None}) == "target: cheats"
    assert report.joint_note({"target": None}) is None


@pytest.mark.parametrize(
    "write",
    [report.to_markdown, report.to_latex, lambda told: to_html(told, Path())],
    ids=["markdown", "latex", "html"],
)
def test_no_control_character_reaches_a_report(write: Callable[[Report], str]) -> None:
    nasty = "cup\x1b[2J\u202e"
    section = Section(nasty, (nasty,), [{"class": nasty, "n": "1"}])
    text = write(Report(nasty, (replace(TGKT, note=nasty),), (nasty,), (section,)))
    assert "x1b" in text
    assert printable(text) == text
