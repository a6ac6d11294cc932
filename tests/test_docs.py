"""The documentation is true: references are current, links lead somewhere, the quick start runs."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from sfkt_cli.cli import app
from sfkt_cli.settings.config import Config, build, section_fields

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_references_are_what_the_program_says() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    for name, text in (
        ("docs/configuration.md", written["configuration"]()),
        ("docs/cli.md", written["commands"]()),
        ("sample_configs/demo.yaml", written["demo"]()),
    ):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert page == text, f"{name} is out of date: run python docs/make_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(<?([^)#>]+)[^)]*\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = {str(page.relative_to(tmp_path).parent) for page in tmp_path.rglob("index.html")}
    assert written == {"." if page.stem == "index" else page.stem for page in PAGES[2:]}


def test_readme_is_short_enough_to_read() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def documented_commands(page: Path) -> list[str]:
    """Commands of a page: lines of code blocks, and what stands between backticks."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
             for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
    spans = re.findall(r"`(sfkt [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [part.strip().removeprefix("$ ") for line in lines for part in re.split(r"&&|\|", line)]
    return [line for line in [*found, *spans] if line.startswith("sfkt ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_have_the_options_and_settings_that_they_use(page: Path) -> None:
    settings = {*section_fields(), *Config.model_fields}
    for line in documented_commands(page):
        command: Any = get_command(app)
        words = shlex.split(line, comments=True)[1:]
        while words and not words[0].startswith("-") and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {option for each in command.params for option in each.opts} | {"--help"}
        for word, following in pairwise([*words, ""]):
            if word.startswith("--"):
                assert word.partition("=")[0] in known, line
            if word == "--set" and following not in ("...", "section.field=value"):
                assert following.partition("=")[0] in settings, line


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
    assert len(list((tmp_path / "runs/quick/bridge/images").glob("*.png"))) == 480
