"""The documentation is true: references are current, links lead somewhere, the quick start runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sfkt_cli.cli import app
from sfkt_cli.config import build

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_references_are_what_the_program_says() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    for name, text in (
        ("configuration.md", written["configuration"]()),
        ("cli.md", written["commands"]()),
    ):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert page == text, f"docs/{name} is out of date: run python docs/make_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(<?([^)#>]+)[^)]*\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_readme_is_short_enough_to_read() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "sample", sorted((ROOT / "sample_configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_sample_configurations_open_with_their_command(sample: Path) -> None:
    text = sample.read_text(encoding="utf-8")
    assert re.search(r"^#.*sfkt ", text), "the first lines say which command uses the file"
    values = yaml.safe_load(text)
    if "methods" not in values:
        build(values)


def test_demo_configuration_is_the_defaults() -> None:
    text = (ROOT / "sample_configs" / "demo.yaml").read_text(encoding="utf-8")
    assert build(yaml.safe_load(text)) == build()


def test_quick_start_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    (tmp_path / "quick.yaml").write_text(settings, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in commands.strip().splitlines():
        program, *words = shlex.split(command, comments=True)
        assert program == "sfkt"
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}: {result.output}\n{result.exception}"
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("tgkt") > 1
    assert len(list((tmp_path / "runs/synthetic/bridge/images").glob("*.png"))) == 144
