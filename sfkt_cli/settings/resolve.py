"""Which settings and which run a command works with, and these settings as text.

Precedence: command-line flag > ``--set`` > YAML file > what this run used before > default.
"""

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from sfkt_cli.console import warn
from sfkt_cli.errors import RunError, first_line
from sfkt_cli.files import write_bytes
from sfkt_cli.settings.config import (
    Config,
    DatasetName,
    MethodName,
    as_dict,
    build,
    describe_type,
    merge,
    one_line,
    parse_assignments,
    section_of,
    settings_of_file,
    values_of,
)
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.runs import RUNS, Run

DEFAULT = "default"
CURRENT = RUNS / "current"  # holds the name of the run used last
READING = (
    "dataset", "image_size", "classes", "split", "prepare.fit", "prepare.max_pixels",
)  # fmt: skip
"""Settings of all data sets that `sfkt prepare` alone uses."""
WIDTH = 96  # columns of a commented configuration file


@dataclass(frozen=True)
class Settings:
    """The settings of one command, and its run."""

    stage: str  # such as ``bridge`` or ``transfer/tgkt``
    config: Config
    run: Run
    layers: Mapping[str, Mapping[str, Any]]  # settings by the place they are from, weakest first

    @property
    def kind(self) -> str:
        """The command of the stage: ``transfer`` of ``transfer/tgkt``."""
        return self.stage.partition("/")[0]


def typed_settings(options: Options) -> dict[str, dict[str, Any]]:
    """Settings of the YAML file, ``--set`` and flags, by that place, the weakest first.

    Raises:
        ConfigError: The file or an assignment cannot be read.
    """
    flags = {
        "seed": options.seed,
        "runtime.gpus": options.gpus,
        "training.warm_start": options.warm_start,
        **options.flags,
    }
    file, read = options.config, options.read
    if file and file not in read:
        read[file] = settings_of_file(file)
    return {
        **({str(file): read[file]} if file else {}),
        "--set": parse_assignments(options.assignments or []),
        "flag": {name: value for name, value in flags.items() if value is not None},
    }


def resolve(options: Options, stage: str, *, new_run: bool = False) -> Settings:
    """Put the settings of a stage together; ``transfer`` becomes ``transfer/<method>`` by itself.

    A command that may begin a ``new_run`` takes ``runs/<data set>`` without ``--run``.

    Raises:
        ConfigError: All settings that are wrong, in one message.
        RunError: There is no run yet and the command cannot begin one.
    """
    typed = typed_settings(options)

    def built(layers: Mapping[str, Mapping[str, Any]]) -> Config:
        places = ["" if place in ("--set", "flag") else place for place in layers]
        return build(*layers.values(), stage=stage, places=places)

    dataset = merge(*typed.values()).get("dataset")
    if not isinstance(dataset, str | None):
        built(typed)  # no name, and so no folder: this says so
    try:
        run = find_run(options, dataset, new_run=new_run)
    except RunError:
        built(typed)  # misspelled settings come first: they do not depend on the run
        raise

    def used_before(stage: str) -> dict[str, Any]:
        used = run.remembered(stage)
        if dataset in (None, used.get("dataset", dataset)):
            return used
        others = {"prepare.root", "classes", section_of(used["dataset"])}  # of the other data set
        return {k: used[k] for k in used if others.isdisjoint((k, k.partition(".")[0]))}

    if stage == "transfer":
        method = merge(used_before(stage), *typed.values()).get("transfer.method")
        if method not in get_args(MethodName):  # none, or one that is refused below
            method = Config().transfer.method
        stage = f"transfer/{method}"
    layers = {str(run.folder): used_before(stage), **typed}
    return Settings(stage, built(layers), run, layers)


def find_run(options: Options, dataset: str | None, *, new_run: bool) -> Run:
    """The run folder: the one asked for, the one used last, or ``runs/<data set>``.

    The run used last does not count if a data set is named that it does not hold.

    Raises:
        RunError: There is no run yet and the command cannot begin one.
    """
    if options.run is not None:
        return Run(options.run, options.force)
    if CURRENT.is_file() and not new_run:
        try:
            last = Path(os.fsdecode(CURRENT.read_bytes()).removesuffix("\n"))
        except (OSError, ValueError) as error:
            raise RunError(f"{CURRENT} cannot be read ({error}): give --run DIR") from None
        if dataset is None or Run(last).remembered("prepare").get("dataset") == dataset:
            return Run(last, options.force)
    if dataset is None and not new_run:
        raise RunError("no run here yet: start with `sfkt prepare NAME`, or give --run DIR")
    return Run(RUNS / (dataset or Config().dataset), options.force)


def warn_of_settings_without_effect(settings: Settings) -> None:
    """Warn of typed settings about the data that differ from those the run was prepared with."""
    prepared = settings.run.remembered("prepare")
    of_run = str(settings.run.folder)
    typed = merge(*(values for place, values in settings.layers.items() if place != of_run))
    about_data = {*READING, section_of(prepared.get("dataset", ""))}
    for name, value in values_of(settings.config).items():
        of_data = about_data & {name, name.partition(".")[0]}
        if of_data and name in typed and prepared.get(name, value) != value:
            warn(
                f"{name} = {one_line(value)} has no effect here: {settings.run.path('prepare')} "
                f"was made with {one_line(prepared[name])}, and only `sfkt prepare --force` uses it"
            )


def has_run(options: Options) -> bool:
    """Whether a run is named or was used before."""
    return options.run is not None or CURRENT.is_file()


def remember_run(run: Run) -> None:
    """Note this run as the one used last, if the working folder can be written to."""
    try:
        write_bytes(CURRENT, os.fsencode(f"{run.folder}\n"))
    except OSError as error:
        warn(
            f"{CURRENT} was not written ({first_line(error)}): give --run {run.folder} with the "
            "next commands"
        )


def origins(settings: Settings) -> list[dict[str, Any]]:
    """Name, value and origin of every setting; a run is the origin only if its value differs."""
    places = {name: place for place, layer in settings.layers.items() for name in layer}
    usual, rows = values_of(Config()), []
    for name, value in values_of(settings.config).items():
        origin = places.get(name, DEFAULT)
        if origin == str(settings.run.folder) and value == usual[name]:
            origin = DEFAULT
        rows.append({"name": name, "value": value, "origin": origin})
    return rows


def show(settings: Settings, *, defaults: bool = True) -> str:
    """Each setting on a line, with its value and where that came from."""
    lines = [
        (f"{setting['name']} = {one_line(setting['value'])}", setting["origin"])
        for setting in origins(settings)
        if defaults or setting["origin"] != DEFAULT
    ]
    width = max((len(text) for text, _ in lines if len(text) <= 60), default=0)
    listing = "\n".join(f"  {text:<{width}}  # {origin}" for text, origin in lines)
    return listing or "  all settings have their defaults"


def commented_yaml(dataset: str) -> str:
    """A configuration file with every default of a data set and what it means.

    Raises:
        ConfigError: There is no such data set.
    """
    config = build({"dataset": dataset})
    others = {section_of(name) for name in get_args(DatasetName) if name != dataset}
    lines = [f"# Settings for {dataset}; use them with: sfkt run FILE.yaml"]
    lines += ["# Lines that you leave out keep what the run used before, else their defaults.", ""]
    lines += _section(config, others, "")
    return "\n".join(lines) + "\n"


def _section(values: BaseModel, left_out: set[str], indent: str) -> Iterator[str]:
    for name, field in type(values).model_fields.items():
        value = getattr(values, name)
        if not isinstance(value, BaseModel):
            meaning, kind = " ".join((field.description or "").split()), field.annotation
            yield from _comment(f"{meaning} ({describe_type(kind)})", indent)
            yield f"{indent}{name}: {one_line(as_dict(values)[name])}"
        elif name not in left_out:
            yield ""
            yield from _comment(" ".join((type(value).__doc__ or "").split()), indent)
            yield f"{indent}{name}:"
            yield from _section(value, left_out, indent + "  ")


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start)
