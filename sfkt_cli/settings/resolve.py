"""Which settings and which run a command works with: the one place where they come together.

Precedence: command-line flag > ``--set`` > YAML file > what this run used before > default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfkt_cli.errors import RunError
from sfkt_cli.settings.config import (
    Config,
    as_dict,
    build,
    merge,
    nest,
    parse_assignments,
    read_yaml,
)
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.runs import RUNS, Run, choose_run, pick

DEFAULT = "default"


@dataclass(frozen=True)
class Settings:
    """The settings of one command, and where each of them came from.

    Attributes:
        config: All of them, checked.
        run: The run folder.
        layers: What each place said, the weakest first.
    """

    config: Config
    run: Run
    layers: Mapping[str, Mapping[str, Any]]

    def origin(self, dotted: str) -> str:
        """Where a setting such as ``bridge.epochs`` came from; a run only if it differs."""
        places = [
            place for place, values in self.layers.items() if pick(values, dotted) is not None
        ]
        if places[-1:] == [str(self.run.folder)]:
            usual = pick(as_dict(Config()), dotted)
            return DEFAULT if pick(as_dict(self.config), dotted) == usual else places[-1]
        return places[-1] if places else DEFAULT


def typed_settings(options: Options) -> dict[str, dict[str, Any]]:
    """Nested settings of the YAML file, ``--set`` and flags, by that place, the weakest first.

    Raises:
        ConfigError: The file or an assignment cannot be read.
    """
    flags: dict[str, Any] = {}
    for name, value in options.flags.items():
        if value is not None:
            flags = merge(flags, nest(name, value))
    return {
        str(options.config): read_yaml(options.config) if options.config else {},
        "--set": parse_assignments(options.assignments),
        "flag": flags,
    }


def is_typed(options: Options, dotted: str) -> bool:
    """Whether the user gave a setting in the YAML file, by ``--set`` or by a flag."""
    return any(pick(values, dotted) is not None for values in typed_settings(options).values())


def resolve(options: Options, stage: str, *, new_run: bool = False) -> Settings:
    """Put the settings of a stage together.

    Args:
        options: What the user typed.
        stage: Name of the stage; ``transfer`` becomes ``transfer/<method>`` by itself.
        new_run: The command may begin a run: without ``--run`` it is ``runs/<data set>``.

    Raises:
        ConfigError: All settings that are wrong, in one message.
        RunError: There is no run yet and the command cannot begin one.
    """
    typed = typed_settings(options)
    wanted: dict[str, Any] = {}
    for values in typed.values():
        wanted = merge(wanted, values)
    try:
        run = find_run(options, wanted.get("dataset"), new_run=new_run)
    except RunError:
        build(wanted)  # what is misspelled is said first: it does not depend on the run
        raise
    if stage == "transfer":
        before = run.remembered("transfer")
        stage = f"transfer/{build(before, wanted).transfer.method}"
    layers = {str(run.folder): run.remembered(stage), **typed}
    return Settings(build(*layers.values()), run, layers)


def find_run(options: Options, dataset: str | None, *, new_run: bool) -> Run:
    """The run folder: the one asked for, the one used last, or ``runs/<data set>``.

    The one used last is left where a data set is named that it does not hold.

    Raises:
        RunError: There is no run yet and the command cannot begin one.
    """
    if options.run is not None:
        return Run(options.run, options.force)
    if new_run:
        return choose_run(None, dataset or Config().dataset, options.force)
    if dataset is not None:
        if (RUNS / "current").is_file():
            last = choose_run(None, None, options.force)
            if last.remembered("prepare").get("dataset") == dataset:
                return last
        return choose_run(None, dataset, options.force)
    return choose_run(None, None, options.force)


def has_run(options: Options) -> bool:
    """Whether a run is named or was used before."""
    return options.run is not None or (RUNS / "current").is_file()
