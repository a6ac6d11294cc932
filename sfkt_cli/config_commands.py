"""The commands below ``sfkt config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sfkt_cli.console import output
from sfkt_cli.settings.options import SETTINGS, Options, shared_options

config_app = typer.Typer(
    help="Show, check and write the settings.",
    epilog="Example: sfkt config init nyu-depth > my.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@config_app.command("show", epilog="Example: sfkt config show --set bridge.epochs=30")
@shared_options(*SETTINGS)
def config_show(options: Options) -> dict[str, Any]:
    """Print every setting, and where its value came from."""
    from sfkt_cli.settings.resolve import has_run, resolve
    from sfkt_cli.settings_text import origins, show

    settings = resolve(options, "transfer", new_run=not has_run(options))
    output(show(settings))
    return {"settings": origins(settings)}


@config_app.command("check", epilog="Example: sfkt config check my.yaml")
@shared_options()
def config_check(
    options: Options,
    file: Annotated[Path, typer.Argument(help="YAML file with settings.")],
) -> dict[str, Any]:
    """Check a configuration file, and name all its problems at once."""
    from sfkt_cli.settings_text import check, settings_text

    changes = check(file)
    output(f"{file} is right; it changes {len(changes)} settings")
    if changes:
        output(settings_text(changes))
    return {"file": file, "changes": changes}


@config_app.command("init", epilog="Example: sfkt config init nyu-depth > my.yaml")
@shared_options()
def config_init(
    options: Options,
    name: Annotated[str, typer.Argument(help="Data set.")] = "synthetic",
) -> dict[str, Any]:
    """Print a commented configuration file for a data set."""
    from sfkt_cli.settings_text import commented_yaml

    text = commented_yaml(name)
    output(text.removesuffix("\n"))
    return {"dataset": name, "yaml": text}


@config_app.command("schema", epilog="Example: sfkt config schema > sfkt.schema.json")
@shared_options()
def config_schema(options: Options) -> dict[str, Any]:
    """Print a JSON Schema of the settings, for editors."""
    from sfkt_cli.settings_text import json_schema

    schema = json_schema()
    output(json.dumps(schema, indent=2))
    return {"schema": schema}
