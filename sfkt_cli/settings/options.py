"""The options that all commands share: declared once, handed to a command as one object."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

from typer import Option

from sfkt_cli.console import console, event, outlets


def _settings() -> list[str]:
    """What the shell completes; Typer picks those that begin with what was typed."""
    from sfkt_cli.settings.config import section_fields

    return [f"{name}=" for name in section_fields()]


@dataclass(frozen=True)
class Options:
    """What the user typed, not yet checked; most fields are options."""

    run: Annotated[
        Path | None,
        Option(
            help="Run folder. Default: the last one used; `prepare` and `run` use runs/<data set>."
        ),
    ] = None
    config: Annotated[Path | None, Option(help="YAML file with settings.")] = None
    assignments: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="SECTION.FIELD=VALUE",
            autocompletion=_settings,
            help="Change one setting; may be given several times.",
        ),
    ] = None
    gpus: Annotated[
        int | None,
        Option(min=0, help="Number of GPUs; 0: the CPU; default: all GPUs of this machine."),
    ] = None
    seed: Annotated[
        int | None, Option(min=0, help="Seed of split, order, augmentation and initialisation.")
    ] = None
    force: Annotated[
        bool, Option("--force", help="Start again from scratch; earlier outputs are deleted.")
    ] = False
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what would be read, done and written; write nothing.")
    ] = False
    warm_start: Annotated[
        Path | None, Option(metavar="RUN", help="Start from the models of this finished run.")
    ] = None
    as_json: Annotated[
        bool, Option("--json", help="Print one JSON object per line on standard output.")
    ] = False
    quiet: Annotated[bool, Option("--quiet", help="Print warnings and errors only.")] = False
    verbose: Annotated[
        bool, Option("--verbose", help="Also print the settings in use and tracebacks.")
    ] = False
    # Settings by dotted name that options of one command stand for; None for options not given.
    flags: Mapping[str, Any] = field(default_factory=dict)
    # The settings of ``config`` once they were read, for copies, too: a pipe can be read once.
    read: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def with_flags(self, flags: Mapping[str, Any]) -> Self:
        """The same with the values of further options."""
        return replace(self, flags={**self.flags, **flags})


EVERYWHERE = ("as_json", "quiet", "verbose")
FINISHED = ("run", "config", "assignments", "gpus")
"""Of commands that use the models of a run."""
SETTINGS = (*FINISHED, "seed")
"""Of commands that work with the settings of a run."""
STAGE = (*SETTINGS, "force", "dry_run")
TRAINING = (*STAGE, "warm_start")


def shared_options(
    *names: str,
) -> Callable[[Callable[..., Mapping[str, Any]]], Callable[..., None]]:
    """Add options by the names of their fields to a command, whose first argument is ``Options``.

    What the command returns is its result, the last line of ``--json``.
    """
    known = inspect.signature(Options).parameters
    shared = [known[name] for name in (*names, *EVERYWHERE)]

    def add(command: Callable[..., Mapping[str, Any]]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**typed: Any) -> None:
            from sfkt_cli.files import at_home

            given = {name: at_home(value) for name, value in typed.items()}
            options = Options(**{option.name: given.pop(option.name) for option in shared})
            console.quiet, outlets.json = options.quiet, options.as_json
            event("result", **command(options, **given))

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in (*own, *shared)]
        )
        return called

    return add
