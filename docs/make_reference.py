"""Write docs/configuration.md, docs/cli.md and sample_configs/demo.yaml from the program itself.

A test keeps them current.

python docs/make_reference.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from typer.main import get_command

from sfkt_cli.cli import app
from sfkt_cli.settings.config import Config, describe_type
from sfkt_cli.settings.options import EVERYWHERE, Options
from sfkt_cli.settings.resolve import commented_yaml

HERE = Path(__file__).parent
DEMO = "# The built-in demo, with every default: sfkt run sample_configs/demo.yaml\n"


def configuration() -> str:
    """Every setting: name, type, default, meaning."""
    lines = [
        "# Settings",
        "",
        "Written by `python docs/make_reference.py` from `sfkt_cli/settings/config.py`.",
        "",
        "Precedence: command-line flag > `--set section.field=value` > YAML file (`--config`) > "
        "what the run used before > default. `sfkt config init NAME > my.yaml` writes a commented "
        "file, `sfkt config check my.yaml` finds all mistakes at once, and `sfkt config show` "
        "prints each value and where it came from. "
        "`sfkt config schema > sfkt.schema.json` writes a JSON Schema. If a YAML file begins "
        "with `# yaml-language-server: $schema=sfkt.schema.json`, "
        "many editors check and complete it while you type.",
        "",
        "## Top level",
        "",
        *_table(Config, ""),
    ]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            text = " ".join((section.__doc__ or "").split())
            lines += ["", f"## {name}", "", text, "", *_table(section, f"{name}.")]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Every command with its help, as `--help` prints it."""
    lines = [
        "# Commands",
        "",
        "Written by `python docs/make_reference.py`; edit the texts in `sfkt_cli/cli.py`.",
        "",
        "Exit codes: 0 done, 1 an error that you can fix (one message says how), 2 wrong usage, "
        "75 stopped by a signal with the state saved: the same command continues from there.",
        "",
        "After `sfkt --install-completion`, your shell completes commands, options, data sets, "
        "methods and the names of settings.",
    ]
    group: Any = get_command(app)
    every = {
        option.name: option for command in group.commands.values() for option in command.params
    }
    shared = [name for name in Options.__dataclass_fields__ if name in every]
    always = [f"`{every[name].opts[0]}`" for name in EVERYWHERE]
    lines += [
        "",
        "## Shared options",
        "",
        f"Every command has {', '.join(always[:-1])} and {always[-1]}. "
        "Each command below names the others that it has.",
    ]
    lines += _options([every[name] for name in shared])
    for name in sorted(group.commands):
        lines += _command(f"sfkt {name}", group.commands[name])
    return "\n".join(lines) + "\n"


def demo() -> str:
    """The settings of the demo: what `sfkt config init` writes, under a first line of its own."""
    return DEMO + commented_yaml("synthetic").partition("\n")[2]


def _command(title: str, command: Any) -> list[str]:
    lines = ["", f"## {title}", "", (command.help or "").strip()]
    if command.epilog:
        lines += ["", f"`{command.epilog.removeprefix('Example: ')}`"]
    common = {*Options.__dataclass_fields__}
    lines += _options([each for each in command.params if each.name not in common])
    names = [f"`{each.opts[0]}`" for each in command.params if each.name in common - {*EVERYWHERE}]
    if names:
        lines += ["", f"Shared options: {', '.join(names)}."]
    for name in sorted(getattr(command, "commands", {})):
        lines += _command(f"{title} {name}", command.commands[name])
    return lines


def _options(parameters: list[Any]) -> list[str]:
    rows = [
        (", ".join(parameter.opts), " ".join(parameter.help.split()))
        for parameter in parameters
        if getattr(parameter, "help", None) and not getattr(parameter, "hidden", False)
    ]
    table = ["", "| option | meaning |", "| --- | --- |"]
    return table + [f"| `{name}` | {_cell(text)} |" for name, text in rows] if rows else []


def _table(model: type[BaseModel], prefix: str) -> list[str]:
    rows = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            continue
        default = "null" if field.default is None else str(field.default)
        default = default.replace("()", "[]")
        default = default.lower() if default in ("True", "False") else default
        cells = [
            f"`{prefix}{name}`",
            _cell(describe_type(annotation)),
            f"`{default}`",
            _cell(" ".join((field.description or "").split())),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (HERE / "configuration.md").write_text(configuration(), encoding="utf-8")
    (HERE / "cli.md").write_text(commands(), encoding="utf-8")
    (HERE.parent / "sample_configs" / "demo.yaml").write_text(demo(), encoding="utf-8")
