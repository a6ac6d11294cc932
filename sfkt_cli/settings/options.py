"""The options that all commands share: declared once, handed to a command as one object."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import typer

from sfkt_cli.console import event, quieten, speak_json


@dataclass(frozen=True)
class Options:
    """What the user typed, before any of it is checked."""

    run: Path | None = None  # folder of ``--run``
    config: Path | None = None  # the YAML file of ``--config``
    assignments: tuple[str, ...] = ()  # texts of ``--set``
    # Dotted settings that have an option of their own; None where it was not given.
    flags: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False  # start finished or differently set stages anew
    dry_run: bool = False  # only say what would be done
    verbose: bool = False  # print the settings in use

    def with_flags(self, flags: Mapping[str, Any]) -> Self:
        """The same with the values of further options."""
        return replace(self, flags={**self.flags, **flags})


def complete_setting(begun: str) -> list[str]:
    """Settings that begin with a text, for completion in the shell."""
    from sfkt_cli.settings.config import section_fields

    return [f"{name}=" for name in section_fields() if name.startswith(begun)]


def _option(kind: Any, *names: str, **about: Any) -> Any:
    return Annotated[kind, typer.Option(*names, **about)]


SHARED = {
    "run": _option(
        Path | None,
        help="Run folder; default: the one used last, for prepare and run runs/<data set>.",
    ),
    "config": _option(Path | None, help="YAML file with settings."),
    "assignments": _option(
        list[str] | None,
        "--set",
        metavar="SECTION.FIELD=VALUE",
        autocompletion=complete_setting,
        help="Change one setting; may be given several times.",
    ),
    "gpus": _option(
        int | None, min=0, help="Number of GPUs; 0: the CPU; default: all of this machine."
    ),
    "seed": _option(
        int | None, min=0, help="Seed of the split, order, augmentation and initialisation."
    ),
    "warm_start": _option(
        Path | None, metavar="RUN", help="Finished run from whose models this one starts."
    ),
    "force": _option(bool, "--force", help="Delete what this stage wrote and start it anew."),
    "dry_run": _option(
        bool, "--dry-run", help="Say what would be read, done and written; write nothing."
    ),
    "as_json": _option(
        bool, "--json", help="One JSON object a line on standard output, for scripts."
    ),
    "quiet": _option(bool, "--quiet", help="Print warnings and errors only."),
    "verbose": _option(bool, "--verbose", help="Also print the settings in use and tracebacks."),
}
"""Parameter of the command line by name."""
EVERYWHERE = ("as_json", "quiet", "verbose")
SETTINGS = ("run", "config", "assignments", "gpus", "seed")
"""Of commands that work with the settings of a run."""
STAGE = (*SETTINGS, "force", "dry_run")
TRAINING = (*STAGE, "warm_start")


class Verbosity:
    """Whether errors come with their traceback; set by ``--verbose``."""

    tracebacks = False


def shared_options(
    *names: str,
) -> Callable[[Callable[..., Mapping[str, Any] | None]], Callable[..., None]]:
    """Add options of ``SHARED`` to a command, which gets them as its first argument, ``Options``.

    What the command returns is its result, the last line of ``--json``.
    """
    chosen = {name: SHARED[name] for name in (*names, *EVERYWHERE)}

    def add(command: Callable[..., Mapping[str, Any] | None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if get_args(annotation)[0] is bool else None,
                annotation=annotation,
            )
            for name, annotation in chosen.items()
        ]

        @functools.wraps(command)
        def called(**given: Any) -> None:
            common = {name: given.pop(name) for name in chosen}
            result = command(_options_of(common), **given)
            event("result", **(result or {}))

        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature([*own, *shared])
        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
        return called

    return add


def _options_of(common: dict[str, Any]) -> Options:
    quieten(common.get("quiet", False))
    speak_json(common.get("as_json", False))
    Verbosity.tracebacks = common.get("verbose", False)
    return Options(
        run=common.get("run"),
        config=common.get("config"),
        assignments=tuple(common.get("assignments") or ()),
        flags={
            "seed": common.get("seed"),
            "runtime.gpus": common.get("gpus"),
            "training.warm_start": common.get("warm_start"),
        },
        force=common.get("force", False),
        dry_run=common.get("dry_run", False),
        verbose=common.get("verbose", False),
    )
