"""One module a transfer method: a batch in, named loss terms out.

A method is an ``nn.Module`` around the student with ``needs_bridge``, ``needs_ti``, ``weights`` (by
term), ``begin_epoch(epoch)`` and ``forward(batch) -> {term: scalar}``; where ``translated`` is
true, its student sees translated images, the frozen translator in front of it. To add one: a
module here, a row in METHODS, a section in ``config.py``, a paragraph in ``docs/methods.md``.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from sfkt_cli.errors import ConfigError

METHODS = {
    "tgkt": "sfkt_cli.methods.tgkt:Tgkt",
    "distill": "sfkt_cli.methods.distill:Distill",
    "shot": "sfkt_cli.methods.shot:Shot",
    "socket": "sfkt_cli.methods.socket_match:Socket",
    "socket+bridge": "sfkt_cli.methods.socket_match:SocketBridge",
    "aad": "sfkt_cli.methods.aad:Aad",
    "nrc": "sfkt_cli.methods.nrc:Nrc",
}
"""Name on the command line to where the objective lives; imported when it is used."""


def unknown_method(name: str) -> str:
    """What to tell the user of a name that is not in METHODS."""
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"setting transfer.method = {name!r}: {hint}choose one of {', '.join(METHODS)}"


def find_method(name: str) -> Any:
    """The objective's class of a method.

    Raises:
        ConfigError: The name is not in METHODS.
    """
    if name not in METHODS:
        raise ConfigError(unknown_method(name))
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
