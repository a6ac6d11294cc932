"""The options that all commands share: declared once, handed to a command as one object."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Options:
    """What the user typed, before any of it is checked.

    Attributes:
        run: Of ``--run``.
        config: The YAML file of ``--config``.
        assignments: Texts of ``--set``.
        flags: Dotted settings that have an option of their own; None where it was not given.
        force: Start finished or differently set stages anew.
        verbose: Print the settings in use.
    """

    run: Path | None = None
    config: Path | None = None
    assignments: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    verbose: bool = False

    def with_flags(self, flags: Mapping[str, Any]) -> Options:
        """The same with the values of further options."""
        return replace(self, flags={**self.flags, **flags})


SHARED = {
    "run": Annotated[
        Path | None,
        typer.Option(help="Run folder; default: runs/<data set>, then the one used last."),
    ],
    "config": Annotated[Path | None, typer.Option(help="YAML file with settings.")],
    "assignments": Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.FIELD=VALUE",
            help="Change one setting; may be given several times.",
        ),
    ],
    "gpus": Annotated[
        int | None,
        typer.Option(min=0, help="GPUs to use; 0: the CPU; default: all that there are."),
    ],
    "seed": Annotated[
        int | None, typer.Option(min=0, help="Fixes order, augmentation, initialisation.")
    ],
    "force": Annotated[
        bool, typer.Option("--force", help="Delete what this stage wrote and start it anew.")
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")],
    "verbose": Annotated[
        bool, typer.Option("--verbose", help="Also print the settings in use and tracebacks.")
    ],
}
"""Parameter of the command line by name."""


class Verbosity:
    """Whether errors come with their traceback; set by ``--verbose``."""

    tracebacks = False


def shared_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add shared options to a command, which gets them as its first argument, an ``Options``.

    Args:
        names: Keys of ``SHARED``; none: all of them.
    """
    chosen = {name: SHARED[name] for name in names or SHARED}

    def add(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name in ("force", "quiet", "verbose") else None,
                annotation=annotation,
            )
            for name, annotation in chosen.items()
        ]

        @functools.wraps(command)
        def called(**given: Any) -> None:
            common = {name: given.pop(name) for name in chosen}
            command(_gather(common), **given)

        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature([*own, *shared])
        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
        return called

    return add


def _gather(common: dict[str, Any]) -> Options:
    from sfkt_cli.console import quieten

    quieten(common.get("quiet", False))
    Verbosity.tracebacks = common.get("verbose", False)
    return Options(
        run=common.get("run"),
        config=common.get("config"),
        assignments=tuple(common.get("assignments") or ()),
        flags={"seed": common.get("seed"), "runtime.gpus": common.get("gpus")},
        force=common.get("force", False),
        verbose=common.get("verbose", False),
    )
