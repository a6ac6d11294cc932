"""One module a transfer method: a batch in, named loss terms out.

A method is an ``nn.Module`` around the student. Every method has:

    needs_bridge                        whether it takes the outputs of a bridge
    needs_ti                            whether it looks at TI pairs
    weights                             the weight of each loss term, by name
    begin_epoch(epoch)                  called before each epoch
    forward(batch) -> {term: scalar}    the loss terms of a batch

and may have:

    after_step()                        called after each step of the optimiser
    facts() -> {name: value}            called after the training, for done.json
    needs_second_view = True            batches hold ``tr_target_2``: the images of ``tr_target``,
                                        shifted and mirrored anew; else they do not
    skips_parameters = True             some steps leave trained parameters out
    translated = True                   the student sees translated images: the frozen translator
                                        stands in front of it

CONTRIBUTING.md says how to add one.
"""

import difflib
from importlib import import_module
from typing import Any, NamedTuple

from sfkt_cli.errors import ConfigError


class Method(NamedTuple):
    """A row of the table of methods.

    Attributes:
        objective: Module and class, imported when the method is used.
        meaning: Its description in reports.
    """

    objective: str
    meaning: str


METHODS = {
    "tgkt": Method(
        "sfkt_cli.methods.tgkt:Tgkt",
        "student taught by the bridge where that sees better, by TI pairs and by itself (TGKT)",
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


def unknown_method(name: str) -> str:
    """The message about a name that is not in METHODS."""
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
    module, _, attribute = METHODS[name].objective.partition(":")
    return getattr(import_module(module), attribute)
