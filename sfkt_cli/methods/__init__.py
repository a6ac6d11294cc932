"""One module for each transfer method, and the table of them.

``objective.py`` says what a method has, and what it may look at.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sfkt_cli.methods.objective import TransferObjective


class Method(NamedTuple):
    """A row of the table of methods."""

    objective: str  # module and class, imported when the method is used
    meaning: str  # its description in reports


METHODS = {
    "tgkt": Method(
        "sfkt_cli.methods.tgkt:Tgkt",
        "student taught by TI pairs, by itself, and by the bridge while that sees better (TGKT)",
    ),
    "distill": Method(
        "sfkt_cli.methods.distill:Distill",
        "student distilled from the bridge alone",
    ),
    "shot": Method(
        "sfkt_cli.methods.shot:Shot",
        "student that adapts to the target images alone (SHOT)",
    ),
    "socket": Method(
        "sfkt_cli.methods.socket_match:Socket",
        "as shot, with features of TI pairs and BatchNorm statistics matched (SOCKET)",
    ),
    "socket+bridge": Method(
        "sfkt_cli.methods.socket_match:SocketBridge",
        "socket behind the translator",
    ),
    "aad": Method(
        "sfkt_cli.methods.aad:Aad",
        "student whose neighbouring target images agree (AaD)",
    ),
    "nrc": Method(
        "sfkt_cli.methods.nrc:Nrc",
        "student whose reciprocal neighbours agree (NRC)",
    ),
}
"""Transfer methods by their names on the command line."""
ENCODED = "source-encoded"
"""The source model with the main student's encoding: no method, but it can be shipped as one."""


def find_method(name: str) -> type[TransferObjective]:
    """The objective's class of a method."""
    module, _, attribute = METHODS[name].objective.partition(":")
    found: type[TransferObjective] = getattr(import_module(module), attribute)
    return found
