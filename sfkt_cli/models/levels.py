"""What a network sees on its way from pixels to features: its activations at each resolution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfkt_cli.models.programs import Program

Watch = Callable[[str, Any], None]
"""Takes the name of a module, or of a step of a recorded program, and its output."""


class Levels:
    """The activations of networks at the end of each of their resolutions, noted as they work.

    The end of a resolution is the last module, or step of a recorded program, that gives maps
    (B, C, H, W) of that size, such as a stage of a ResNet.

    Args:
        networks: In inference mode; one, or the backbones of a mixture.
        images: What they take (B, 3, H, W), for one trial.
    """

    def __init__(self, networks: Sequence[nn.Module], images: Tensor) -> None:
        self._ends = [(network, _ends_of_resolutions(network, images)) for network in networks]

    @property
    def names(self) -> list[str]:
        """Of the modules, from fine to coarse, network by network."""
        return [name for _, ends in self._ends for name in ends]

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """A list that passes of the networks inside the block add their activations to."""
        seen: list[Tensor] = []
        with contextlib.ExitStack() as watched:
            for network, ends in self._ends:
                watched.enter_context(
                    _watching(network, lambda _, output: seen.append(output), ends)
                )
            yield seen


def _ends_of_resolutions(network: nn.Module, images: Tensor) -> list[str]:
    last: dict[tuple[int, ...], str] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            last.pop(size := tuple(output.shape[2:]), None)
            last[size] = name

    with torch.inference_mode(), _watching(network, note):
        network(images)
    return list(last.values())


@contextlib.contextmanager
def _watching(
    network: nn.Module, watch: Watch, only: Sequence[str] | None = None
) -> Iterator[None]:
    """Have modules, or the steps of a program, tell of their outputs: all, or those of a name."""
    if isinstance(network, Program):
        network.watch = lambda name, out: watch(name, out) if only is None or name in only else None
        try:
            yield
        finally:
            network.watch = None
        return

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, given, output: watch(name, output)

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in network.named_modules()
        if name and (only is None or name in only)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
