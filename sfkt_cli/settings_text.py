"""Settings as text: where each came from, and a commented YAML file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sfkt_cli.errors import ConfigError
from sfkt_cli.methods import METHODS, unknown_method
from sfkt_cli.settings.config import (
    Config,
    as_dict,
    build,
    describe_type,
    listed,
    pick,
    problems_of,
    read_yaml,
    section_fields,
)
from sfkt_cli.settings.resolve import DEFAULT, Settings
from sfkt_cli.settings.runs import DATA_SECTIONS

WIDTH = 96


def show(settings: Settings) -> str:
    """Every setting on a line, with its value and where that came from."""
    return "\n".join(_lines(settings, list(section_fields())))


def changed(settings: Settings) -> str:
    """The settings that are no defaults, as :func:`show` prints them."""
    names = [name for name in section_fields() if settings.origin(name) != DEFAULT]
    return "\n".join(_lines(settings, names)) or "  all settings have their defaults"


def origins(settings: Settings) -> list[dict[str, Any]]:
    """Name, value and origin of every setting."""
    values = as_dict(settings.config)
    return [
        {"name": name, "value": pick(values, name), "origin": settings.origin(name)}
        for name in section_fields()
    ]


def check(path: Path) -> dict[str, Any]:
    """What a configuration file changes, by dotted name.

    Raises:
        ConfigError: All that is wrong with it, in one message.
    """
    written, problems = read_yaml(path), list[str]()
    method = pick(written, "transfer.method")
    if isinstance(method, str) and method not in METHODS:
        problems.append(unknown_method(method))
    problems += problems_of(written)
    if problems:
        raise ConfigError(f"{path}: {listed(problems)}")
    values, defaults = as_dict(build(written)), as_dict(Config())
    names = [name for name in section_fields() if pick(values, name) != pick(defaults, name)]
    return {name: pick(values, name) for name in names}


def settings_text(values: Mapping[str, Any]) -> str:
    """Settings by dotted name as text, one a line."""
    return "\n".join(f"  {name} = {_text(value)}" for name, value in values.items())


def commented_yaml(dataset: str) -> str:
    """A configuration file with every default and what it means.

    Args:
        dataset: Sections of other data sets are left out.

    Raises:
        ConfigError: There is no such data set.
    """
    config = build({"dataset": dataset})
    others = set(DATA_SECTIONS.values()) - {DATA_SECTIONS.get(dataset)}
    lines = [f"# Settings for {dataset}; use them with: sfkt run FILE.yaml"]
    lines += ["# Lines that you leave out keep their defaults.", ""]
    lines += _section(config, {name for name in others if name}, "")
    return "\n".join(lines) + "\n"


def _lines(settings: Settings, names: list[str]) -> Iterator[str]:
    values = as_dict(settings.config)
    texts = {name: f"{name} = {_text(pick(values, name))}" for name in names}
    width = max((len(text) for text in texts.values() if len(text) <= 60), default=0)
    for name, text in texts.items():
        yield f"  {text:<{width}}  # {settings.origin(name)}"


def _section(values: BaseModel, left_out: set[str], indent: str) -> Iterator[str]:
    for name, field in type(values).model_fields.items():
        value = getattr(values, name)
        if not isinstance(value, BaseModel):
            yield from _setting(name, field, as_dict(values)[name], indent)
        elif name not in left_out:
            yield ""
            yield from _comment((type(value).__doc__ or "").strip(), indent)
            yield f"{indent}{name}:"
            yield from _section(value, left_out, indent + "  ")


def _setting(name: str, field: FieldInfo, value: Any, indent: str) -> Iterator[str]:
    described = " ".join((field.description or "").split())
    kind = describe_type(field.annotation)
    yield from _comment(f"{described} ({kind})" if described else kind, indent)
    yield f"{indent}{name}: {_text(value)}"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start)


def _text(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()
