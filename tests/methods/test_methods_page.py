"""docs/methods.md names what there is, and nothing else."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from sfkt_cli import losses
from sfkt_cli.methods import METHODS
from sfkt_cli.models.translators import TRANSLATORS
from sfkt_cli.settings.config import section_fields

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
HELPERS = {"reverse_gradient"}


def test_every_equation_is_there() -> None:
    functions = {
        name for name, _ in inspect.getmembers(losses, inspect.isfunction)
        if getattr(losses, name).__module__ == losses.__name__ and not name.startswith("_")
    }  # fmt: skip
    named = set(re.findall(r"losses\.(\w+)", TEXT))
    assert named - {"py"} == functions - HELPERS


def test_every_equation_has_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    for name, _ in inspect.getmembers(losses, inspect.isfunction):
        if getattr(losses, name).__module__ == losses.__name__ and not name.startswith("_"):
            assert re.search(rf"\b(slow_)?{name}\b", tests), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_section(method: str) -> None:
    assert f"\n### {method}\n" in TEXT


def test_the_demo_benchmark_has_every_method() -> None:
    demo = Path(__file__).parents[2] / "sample_configs" / "benchmark-demo.yaml"
    assert set(METHODS) <= set(yaml.safe_load(demo.read_text(encoding="utf-8"))["methods"])


@pytest.mark.parametrize("name", TRANSLATORS)
def test_every_translator_has_its_row(name: str) -> None:
    assert f"\n| `{name}` |" in TEXT


def test_every_setting_that_is_named_exists() -> None:
    known = section_fields()
    sections = "|".join(sorted({name.partition(".")[0] for name in known if "." in name}))
    named = set(re.findall(rf"(?<![./])\b((?:{sections})\.[a-z_]+)\b", TEXT)) - {"tgkt.py"}
    assert named
    assert named <= set(known)


def test_every_function_that_is_named_exists() -> None:
    for module, name in re.findall(r"`((?:methods|models|scores)(?:\.\w+)?)\.(\w+)`", TEXT):
        assert hasattr(import_module(f"sfkt_cli.{module}"), name)
